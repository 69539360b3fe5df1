"""MLflow: runs, models, and the lineage from parent to child."""
