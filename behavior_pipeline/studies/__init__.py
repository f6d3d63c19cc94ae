"""Side rooms off the nightly path: studies that read the pipeline's files and never feed it."""
