"""Stage 1: what surrounds the SQL in `dbt_sql/`: its variables, the export of marts, analytics.duckdb."""
