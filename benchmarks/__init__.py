"""What rawaio costs, beside others: `python3 -m benchmarks`.

- `__main__`: the command.
- `sections/`: what is compared with what, and how often; a module for each.
- `programs/`: what is measured, each in a process of its own; `watch` counts and times inside them.
- `harness`: processes that take turns. `figures`: ratios and the best of several.
- `fio`, `rivals`, `machine`, `files`: what it is compared with, where, and on which files.
- `budgets`: what is to be reached, and what becomes of it.
- `report`, `render`, `comparison`, `charts`: what is written, shown, set beside an earlier report,
  and drawn.
"""
