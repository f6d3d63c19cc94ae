{{ config(meta={'grain': 'night'}) }}

with

cutoffs as (

    select * from {{ ref('int_observation_cutoffs') }}

),

user_days as (

    select * from {{ ref('user_days') }}

),

user_history as (

    select * from {{ ref('int_user_history') }}

),

user_diversity as (

    select * from {{ ref('int_user_diversity') }}

),

night as (

    select * from cutoffs
    where is_night_cutoff

),

-- Whole days, because a cutoff is a midnight; no window is longer.
recent_days as (

    select
        user_days.*,
        night.cutoff_date,
        night.lookback_start_date
    from user_days
    inner join night
        on
            user_days.activity_date < night.cutoff_date
            and user_days.activity_date
            >= least(night.lookback_start_date, night.cutoff_date - 90)

),

recent as (

    select
        user_id,
        sum(num_events) filter (where {{ in_last_days(1) }}) as num_events_1d,
        {%- for name, condition in [
            ('_7d', in_last_days(7)), ('_30d', in_last_days(30)), ('_90d', in_last_days(90)),
            ('_lookback', 'activity_date >= lookback_start_date')
        ] %}
        sum(num_events) filter (where {{ condition }}) as num_events{{ name }},
        count(*) filter (where {{ condition }}) as num_active_days{{ name }},
        sum(num_sessions) filter (where {{ condition }}) as num_sessions{{ name }},
        sum(num_qualifying_events) filter (where {{ condition }})
            as num_qualifying_events{{ name }},
        sum(amount) filter (where {{ condition }}) as amount{{ name }},
        {%- endfor %}
        sum(num_amounts) filter (where activity_date >= lookback_start_date)
            as num_amounts_lookback
    from recent_days
    group by user_id

),

-- Silence, tenure and gaps in one unit, for the ratios below.
timed as (

    select
        user_history.*,
        night.observation_cutoff,
        {%- for name in ['_1d', '_7d', '_30d', '_90d', '_lookback'] %}
        coalesce(recent.num_events{{ name }}, 0) as num_events{{ name }},
        {%- endfor %}
        {%- for name in ['_7d', '_30d', '_90d', '_lookback'] %}
        coalesce(recent.num_active_days{{ name }}, 0) as num_active_days{{ name }},
        coalesce(recent.num_sessions{{ name }}, 0) as num_sessions{{ name }},
        coalesce(recent.num_qualifying_events{{ name }}, 0) as num_qualifying_events{{ name }},
        coalesce(recent.amount{{ name }}, 0) as amount{{ name }},
        {%- endfor %}
        coalesce(recent.num_amounts_lookback, 0) as num_amounts_lookback,
        {{ seconds_between('user_history.last_event_at', 'night.observation_cutoff') }}
            as silence_seconds,
        {{ hours_between('user_history.last_event_at', 'night.observation_cutoff') }} / 24.0
            as recency_days,
        {{ hours_between('user_history.first_event_at', 'night.observation_cutoff') }} / 24.0
            as tenure_days,
        {{ share('user_history.gap_seconds', 'user_history.num_events - 1') }} as mean_gap_seconds,
        {{ share('user_history.log_gap_sum', 'user_history.num_events - 1') }} as mean_log_gap,
        {{ share('user_history.log_gap_square_sum', 'user_history.num_events - 1') }}
            as mean_square_log_gap
    from user_history
    cross join night
    left join recent on user_history.user_id = recent.user_id

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
