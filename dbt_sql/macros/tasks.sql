{#- Events that make a user active: churn, RFM, population and value. -#}
{% macro is_qualifying(event_type) -%}
  {%- set types = var('qualifying_event_types') -%}
  {%- if types -%} {{ event_type }} in ({{ quote_texts(types) }})
  {%- else -%} true
  {%- endif -%}
{%- endmacro %}

{#- Events that count as taking a propensity target. -#}
{% macro is_propensity_event(event_type) -%}
  {%- set types = var('propensity_event_types') -%}
  {%- if types -%} {{ event_type }} in ({{ quote_texts(types) }})
  {%- else -%} {{ is_qualifying(event_type) }}
  {%- endif -%}
{%- endmacro %}

{#- The column whose values are propensity targets: a name from a fixed list, never free text. -#}
{% macro propensity_column() -%}
  {%- set allowed = ['event_type', 'item_id', 'category', 'location', 'context'] -%}
  {%- if var('propensity_column') not in allowed -%}
    {{ exceptions.raise_compiler_error(
        "propensity_column must be one of " ~ allowed | join(", ")
    ) }}
  {%- endif -%}
  {{ var('propensity_column') }}
{%- endmacro %}
