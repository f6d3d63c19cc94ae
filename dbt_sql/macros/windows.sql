{#- A point in time given as a variable. -#}
{% macro timestamp_constant(text) -%}
  cast({{ quote_text(text) }} as timestamp with time zone)
{%- endmacro %}

{#- True for days less than so many days before the cutoff. A cutoff is a midnight in UTC, so whole
    days decide what is before it. -#}
{% macro in_last_days(days) -%}
  activity_date >= cutoff_date - {{ days | int }}
{%- endmacro %}

{#- How varied a column is in each user's events: one row per user. `entropy` is in nats,
    log(N) - sum(n log n) / N, summed as decimals so that it does not depend on threads,
    and rounded to what they keep. -#}
{% macro diversity(events, column) -%}
  select
    user_id,
    count(*) as num_values,
    sum(num_events) as num_events,
    max(num_events) / sum(num_events) as top_share,
    abs(round(
      ln(sum(num_events))
      - cast(sum(cast(num_events * ln(num_events) as decimal(24, 9))) as double)
      / sum(num_events),
      8
    )) as entropy
  from (
    select
      user_id,
      {{ column }},
      count(*) as num_events
    from {{ events }}
    where {{ column }} is not null
    group by user_id, {{ column }}
  ) as value_counts
  group by user_id
{%- endmacro %}
