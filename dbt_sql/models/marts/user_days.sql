{{ config(meta={'grain': 'user'}) }}

with

events as (

    select * from {{ ref('events_sessionized') }}

),

described as (

    select
        user_id,
        event_type,
        event_number,
        occurred_at,
        gap_seconds,
        {{ utc_date('occurred_at') }} as activity_date,
        hour({{ utc_timestamp('occurred_at') }}) as hour_of_day,
        {{ is_qualifying('event_type') }} as is_qualifying,
        coalesce(gap_seconds > {{ var('session_gap_seconds') | int }}, true) as is_session_start,
        {{ exact_amount('amount') }} as amount,
        cast(gap_seconds as decimal(18, 6)) as exact_gap_seconds,
        ln(1 + gap_seconds) as log_gap
    from events

),

days as (

    select
        user_id,
        activity_date,
        cast(count(*) as integer) as num_events,
        cast(count(*) filter (where is_qualifying) as integer) as num_qualifying_events,
        cast(count(*) filter (where is_session_start) as integer) as num_sessions,
        cast(
            count(*) filter (where hour_of_day < 6 or hour_of_day >= 22) as integer
        ) as num_night_events,
        cast(
            count(*) filter (where hour_of_day >= 6 and hour_of_day < 12) as integer
        ) as num_morning_events,
        cast(
            count(*) filter (where hour_of_day >= 12 and hour_of_day < 18) as integer
        ) as num_afternoon_events,
        coalesce(sum(amount), 0) as amount,
        coalesce(sum(amount) filter (where is_qualifying), 0) as qualifying_amount,
        max(amount) as max_amount,
        cast(count(amount) as integer) as num_amounts,
        cast(coalesce(sum(exact_gap_seconds), 0) as decimal(18, 6)) as gap_seconds,
        cast(
            coalesce(sum(exact_gap_seconds) filter (where not is_session_start), 0)
            as decimal(18, 6)
        ) as session_seconds,
        coalesce(max(exact_gap_seconds), 0) as max_gap_seconds,
        coalesce(arg_max(exact_gap_seconds, event_number), 0) as last_gap_seconds,
        cast(
            coalesce(sum(cast(log_gap as decimal(18, 9))), 0) as decimal(18, 9)
        ) as log_gap_sum,
        cast(
            coalesce(sum(cast(log_gap * log_gap as decimal(18, 9))), 0) as decimal(18, 9)
        ) as log_gap_square_sum,
        arg_min(event_type, event_number) as first_event_type,
        min(occurred_at) as first_event_at,
        max(occurred_at) as last_event_at,
        max(occurred_at) filter (where is_qualifying) as last_qualifying_at
    from described
    group by user_id, activity_date

),

final as (

    select
        *,
        activity_date - lag(activity_date) over (
            partition by user_id order by activity_date
        ) as days_since_active
    from days

)

select * from final
