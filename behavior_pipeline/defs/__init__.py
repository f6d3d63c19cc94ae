"""What Dagster sees: thin assets over the stages' functions, in files named as the stages."""
