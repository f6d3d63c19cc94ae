{{ config(meta={'grain': 'night'}) }}

with

cutoffs as (

    select * from {{ ref('int_observation_cutoffs') }}

),

user_days as (

    select * from {{ ref('user_days') }}

),

user_diversity as (

    select * from {{ ref('int_user_diversity') }}

),

-- Days before the cutoff: whole days, because a cutoff is a midnight.
known_days as (

    select
        user_days.*,
        cutoffs.observation_cutoff,
        cutoffs.cutoff_date,
        cutoffs.lookback_start_date
    from user_days
    inner join cutoffs on user_days.activity_date < cutoffs.cutoff_date
    where cutoffs.is_night_cutoff

),

history as (

    select
        observation_cutoff,
        user_id,
        {%- for days in [1, 7, 30, 90] %}
        coalesce(sum(num_events) filter (where {{ in_last_days(days) }}), 0)
            as num_events_{{ days }}d,
        {%- endfor %}
        {%- for days in [7, 30, 90] %}
        count(*) filter (where {{ in_last_days(days) }}) as num_active_days_{{ days }}d,
        coalesce(sum(num_sessions) filter (where {{ in_last_days(days) }}), 0)
            as num_sessions_{{ days }}d,
        coalesce(sum(num_qualifying_events) filter (where {{ in_last_days(days) }}), 0)
            as num_qualifying_events_{{ days }}d,
        coalesce(sum(amount) filter (where {{ in_last_days(days) }}), 0) as amount_{{ days }}d,
        {%- endfor %}
        {%- for column in [
            'num_events', 'num_sessions', 'num_qualifying_events', 'amount', 'num_amounts'
        ] %}
        coalesce(sum({{ column }}) filter (where activity_date >= lookback_start_date), 0)
            as {{ column }}_lookback,
        sum({{ column }}) as {{ column }},
        {%- endfor %}
        count(*) filter (where activity_date >= lookback_start_date) as num_active_days_lookback,
        count(*) as num_active_days,
        coalesce(max(max_amount), 0) as max_amount,
        sum(gap_seconds) as gap_seconds,
        sum(session_seconds) as session_seconds,
        max(max_gap_seconds) as max_gap_seconds,
        arg_max(last_gap_seconds, activity_date) as last_gap_seconds,
        cast(sum(log_gap_sum) as double) as log_gap_sum,
        cast(sum(log_gap_square_sum) as double) as log_gap_square_sum,
        coalesce(median(days_since_active), 0) as median_days_between_active_days,
        coalesce(sum(num_events) filter (where {{ is_weekend('activity_date') }}), 0)
            as num_weekend_events,
        sum(num_night_events) as num_night_events,
        min(first_event_at) as first_event_at,
        max(last_event_at) as last_event_at
    from known_days
    group by observation_cutoff, user_id

),

-- Silence, tenure and gaps in one unit, for the ratios below.
timed as (

    select
        *,
        {{ seconds_between('last_event_at', 'observation_cutoff') }} as silence_seconds,
        {{ hours_between('last_event_at', 'observation_cutoff') }} / 24.0 as recency_days,
        {{ hours_between('first_event_at', 'observation_cutoff') }} / 24.0 as tenure_days,
        {{ share('gap_seconds', 'num_events - 1') }} as mean_gap_seconds,
        {{ share('log_gap_sum', 'num_events - 1') }} as mean_log_gap,
        {{ share('log_gap_square_sum', 'num_events - 1') }} as mean_square_log_gap
    from history

),

final as (

    select
        timed.observation_cutoff,
        timed.user_id,
        {%- for days in ['_1d', '_7d', '_30d', '_90d', '_lookback', ''] %}
        cast(timed.num_events{{ days }} as bigint) as num_events{{ days }},
        {%- endfor %}
        {%- for days in ['_7d', '_30d', '_90d', '_lookback', ''] %}
        timed.num_active_days{{ days }},
        cast(timed.num_sessions{{ days }} as bigint) as num_sessions{{ days }},
        cast(timed.num_qualifying_events{{ days }} as bigint) as num_qualifying_events{{ days }},
        cast(timed.amount{{ days }} as double) as amount{{ days }},
        {%- endfor %}
        {{ share('timed.amount_lookback', 'timed.num_amounts_lookback') }} as mean_amount_lookback,
        {{ share('timed.amount', 'timed.num_amounts') }} as mean_amount,
        cast(timed.max_amount as double) as max_amount,
        {%- for name, values in [
            ('item', 'items'), ('category', 'categories'), ('event_type', 'event_types')
        ] %}
        user_diversity.num_{{ values }},
        user_diversity.{{ name }}_entropy,
        user_diversity.top_{{ name }}_share,
        {%- endfor %}
        user_diversity.repeat_item_share,
        timed.mean_gap_seconds,
        cast(timed.max_gap_seconds as double) as max_gap_seconds,
        cast(timed.last_gap_seconds as double) as last_gap_seconds,
        timed.mean_log_gap,
        sqrt(greatest(timed.mean_square_log_gap - timed.mean_log_gap * timed.mean_log_gap, 0))
            as std_log_gap,
        timed.median_days_between_active_days,
        timed.recency_days,
        timed.tenure_days,
        {{ share('timed.silence_seconds', 'timed.mean_gap_seconds') }} as silence_over_mean_gap,
        {{ share('timed.num_events', 'timed.num_sessions') }} as mean_session_events,
        {{ share('timed.session_seconds', 'timed.num_sessions') }} as mean_session_seconds,
        {{ share('timed.num_weekend_events', 'timed.num_events') }} as weekend_share,
        {{ share('timed.num_night_events', 'timed.num_events') }} as night_share,
        {{ share('timed.num_active_days', 'timed.tenure_days') }} as active_days_per_day,
        {{ share('timed.num_events_7d', 'timed.num_events_30d') }} as events_share_7d_of_30d,
        {{ share('timed.num_events_30d', 'timed.num_events_90d') }} as events_share_30d_of_90d,
        {{ share('timed.num_events_90d', 'timed.num_events_lookback') }}
            as events_share_90d_of_lookback,
        {{ share('timed.num_sessions_30d', 'timed.num_sessions_90d') }}
            as sessions_share_30d_of_90d
    from timed
    inner join user_diversity on timed.user_id = user_diversity.user_id

)

select * from final
