"""Prefect's server, MLflow's server and the worker, as `make up` and the `puzzle` command start them."""
