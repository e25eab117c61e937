# matplotlib, whose own annotations leave much open: what the benchmarks use of it.
