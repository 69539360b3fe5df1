"""Speed and quality measurements, each a command that prints its table: `python -m benchmarks.NAME --help`.

`bld_throughput`, `scoring_speed`, `workflow_overhead` and `task_overhead` compare speeds, `search` the exact search
with PuLP's CBC; `engines` runs exported children in serving engines; `search_quality` and `real_parents` show what
finished runs came to; `faults` breaks things, and says what came of it. Nothing asserts a time: machines are noisy, so
contestants take turns and medians are shown.
"""
