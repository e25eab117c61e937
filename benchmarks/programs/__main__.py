"""Run one program: `python -m benchmarks.programs MODULE ARGUMENTS`, the arguments as JSON."""

from __future__ import annotations

import json
import sys
from importlib import import_module

if __name__ == "__main__":
    module, arguments = sys.argv[1:]
    print(json.dumps(import_module(f"benchmarks.programs.{module}").run(**json.loads(arguments))))
