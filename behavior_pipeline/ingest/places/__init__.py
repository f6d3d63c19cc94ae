"""Where raw events may lie: local files, DuckDB and PostgreSQL tables, objects of S3."""
