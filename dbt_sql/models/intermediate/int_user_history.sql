{{ config(materialized='table', meta={'grain': 'user'}) }}

with

cutoffs as (

    select {{ utc_date('max(observation_cutoff)') }} as cutoff_date
    from {{ source('pipeline', 'night_cutoffs') }}

),

user_days as (

    select * from {{ ref('user_days') }}

),

known_days as (

    select user_days.*
    from user_days
    inner join cutoffs on user_days.activity_date < cutoffs.cutoff_date

),

final as (

    select
        user_id,
        {%- for column in [
            'num_events', 'num_sessions', 'num_qualifying_events', 'num_amounts',
            'num_night_events', 'num_morning_events', 'num_afternoon_events'
        ] %}
        cast(sum({{ column }}) as bigint) as {{ column }},
        {%- endfor %}
        cast(
            coalesce(sum(num_events) filter (where {{ is_weekend('activity_date') }}), 0) as bigint
        ) as num_weekend_events,
        {%- for weekday in weekdays() %}
        cast(
            coalesce(
                sum(num_events) filter (where isodow(activity_date) = {{ loop.index }}), 0
            ) as bigint
        ) as num_{{ weekday }}_events,
        {%- endfor %}
        max(num_events) as max_day_events,
        cast(sum(cast(num_events as bigint) * num_events) as double) as day_events_square_sum,
        count(*) as num_active_days,
        sum(amount) as amount,
        sum(qualifying_amount) as qualifying_amount,
        coalesce(max(max_amount), 0) as max_amount,
        sum(gap_seconds) as gap_seconds,
        sum(session_seconds) as session_seconds,
        max(max_gap_seconds) as max_gap_seconds,
        arg_max(last_gap_seconds, activity_date) as last_gap_seconds,
        cast(sum(log_gap_sum) as double) as log_gap_sum,
        cast(sum(log_gap_square_sum) as double) as log_gap_square_sum,
        cast(coalesce(median(days_since_active), 0) as double) as median_days_between_active_days,
        coalesce(max(days_since_active), 0) as max_days_between_active_days,
        cast(coalesce(sum(days_since_active), 0) as bigint) as days_between_sum,
        cast(
            coalesce(sum(days_since_active * days_since_active), 0) as double
        ) as days_between_square_sum,
        max(last_qualifying_at) as last_qualifying_at,
        min(first_event_at) as first_event_at,
        max(last_event_at) as last_event_at
    from known_days
    group by user_id

)

select * from final
