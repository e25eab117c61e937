"""What is measured: each module has a `run`, whose arguments come from the command line as JSON.

What it returns is by metric, and is printed.
"""
