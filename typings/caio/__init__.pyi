# caio 0.12.10, whose annotations leave out what matters: what the benchmarks use of it.
