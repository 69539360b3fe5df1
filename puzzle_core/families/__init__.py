"""Model families: one YAML file each, and the record that the files are read into (DESIGN rule 8)."""
