"""Files of other projects: what users have already, and what serving engines want. No torch, no Prefect."""
