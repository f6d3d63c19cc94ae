{#- Sums of doubles depend on the order of the rows, and so on threads; sums of decimals do not.
    Non-finite amounts count as none, and amounts beyond +-1e15 as 1e15: then no sum of fewer than
    1e16 rows can overflow. Six decimals are kept. -#}
{% macro exact_amount(amount) -%}
  cast(
    case when isfinite({{ amount }}) then greatest(least({{ amount }}, 1e15), -1e15) end
    as decimal(22, 6)
  )
{%- endmacro %}

{#- The sum as a double, 0 where there is nothing to sum. -#}
{% macro sum_of_amounts(amount) -%}
  cast(coalesce(sum({{ exact_amount(amount) }}), 0) as double)
{%- endmacro %}

{#- A quotient that is 0 where there is nothing to divide by: features are never null. -#}
{% macro share(part, whole) -%}
  coalesce(cast({{ part }} as double) / nullif(cast({{ whole }} as double), 0), 0)
{%- endmacro %}
