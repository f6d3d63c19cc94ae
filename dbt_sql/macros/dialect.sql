{#- Where SQL dialects differ. Everything else in the models is common SQL, apart from FILTER,
    QUALIFY and arg_min/arg_max, which Spark, Snowflake and BigQuery have under these or like names. -#}

{#- A timestamp with time zone as the wall clock of UTC, whatever the session's time zone. -#}
{% macro utc_timestamp(column) -%}
  make_timestamp(epoch_us({{ column }}))
{%- endmacro %}

{% macro utc_date(column) -%}
  cast({{ utc_timestamp(column) }} as date)
{%- endmacro %}

{% macro seconds_between(earlier, later) -%}
  (epoch_us({{ later }}) - epoch_us({{ earlier }})) / 1e6
{%- endmacro %}

{#- Hour boundaries passed between two times. -#}
{% macro hours_between(earlier, later) -%}
  date_diff('hour', {{ utc_timestamp(earlier) }}, {{ utc_timestamp(later) }})
{%- endmacro %}

{% macro is_weekend(date) -%}
  isodow({{ date }}) >= 6
{%- endmacro %}
