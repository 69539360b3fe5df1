"""What runs the tasks of a flow side by side: threads, or processes under Dask."""
