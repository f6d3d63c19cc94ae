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
    {{ sum_of_largest('num_events', 3) }} / sum(num_events) as top_3_share,
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

{#- Names of the days of the week, Monday first, as ISO numbers them from 1. -#}
{% macro weekdays() -%}
  {{ return(['monday', 'tuesday', 'wednesday', 'thursday', 'friday', 'saturday', 'sunday']) }}
{%- endmacro %}

{#- An event's weight at the cutoff: halved with every so many whole days before it. -#}
{% macro decay(half_life_days) -%}
  pow(2, -(cutoff_date - 1 - activity_date) / {{ half_life_days | int }}.0)
{%- endmacro %}

{#- How evenly a total spreads over some columns that add up to it, in nats; 0 for no events. -#}
{% macro entropy_of(parts, total) -%}
  abs(round(
    {%- for part in parts %}
    {{ " " if loop.first else "+ " }}case
      when {{ part }} > 0
        then -({{ share(part, total) }}) * ln({{ share(part, total) }})
      else 0
    end
    {%- endfor %}, 8
  ))
{%- endmacro %}
