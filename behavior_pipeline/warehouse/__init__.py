"""Stage 1: what surrounds the SQL in `dbt_sql/`: variables, build, export, analytics."""
