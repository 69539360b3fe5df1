"""Speed and quality measurements, each a command that prints its table: `python -m benchmarks.NAME --help`.

`bld_throughput`, `scoring_speed`, `workflow_overhead` and `task_overhead` compare speeds. `search` compares the exact
search with PuLP's CBC. `engines` runs exported children in serving engines. `search_quality` and `real_parents` show
results of finished runs. `faults` injects faults and reports the outcome. No benchmark asserts a time: machines are
noisy, so the variants of a comparison run in alternation, and tables show medians.
"""
