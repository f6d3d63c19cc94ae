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
            ('_7d', in_last_days(7)), ('_14d', in_last_days(14)), ('_30d', in_last_days(30)),
            ('_60d', in_last_days(60)), ('_90d', in_last_days(90)),
            ('_lookback', 'activity_date >= lookback_start_date')
        ] %}
        sum(num_events) filter (where {{ condition }}) as num_events{{ name }},
        count(*) filter (where {{ condition }}) as num_active_days{{ name }},
        sum(num_sessions) filter (where {{ condition }}) as num_sessions{{ name }},
        sum(num_qualifying_events) filter (where {{ condition }})
            as num_qualifying_events{{ name }},
        sum(amount) filter (where {{ condition }}) as amount{{ name }},
        {%- endfor %}
        {%- for days in [7, 30, 90] %}
        -- Sums of decimals do not depend on the order of rows.
        cast(sum(cast(num_events * {{ decay(days) }} as decimal(24, 9))) as double)
            as decayed_events_{{ days }}d,
        cast(sum(cast({{ decay(days) }} as decimal(24, 9))) as double)
            as decayed_active_days_{{ days }}d,
        {%- endfor %}
        cast(
            sum(cast(cast(amount as double) * {{ decay(30) }} as decimal(38, 6))) as double
        ) as decayed_amount_30d,
        sum(num_amounts) filter (where {{ in_last_days(30) }}) as num_amounts_30d,
        {%- for column in [
            'num_amounts', 'num_night_events', 'gap_seconds', 'log_gap_sum'
        ] %}
        sum({{ column }}) filter (where activity_date >= lookback_start_date)
            as {{ column }}_lookback,
        {%- endfor %}
        sum(num_events) filter (
            where activity_date >= lookback_start_date and {{ is_weekend('activity_date') }}
        ) as num_weekend_events_lookback,
        max(max_gap_seconds) filter (where activity_date >= lookback_start_date)
            as max_gap_seconds_lookback
    from recent_days
    group by user_id

),

-- Silence, tenure and gaps in one unit, for the ratios below.
timed as (

    select
        user_history.*,
        night.observation_cutoff,
        {%- for name in ['_1d', '_7d', '_14d', '_30d', '_60d', '_90d', '_lookback'] %}
        coalesce(recent.num_events{{ name }}, 0) as num_events{{ name }},
        {%- endfor %}
        {%- for name in ['_7d', '_14d', '_30d', '_60d', '_90d', '_lookback'] %}
        coalesce(recent.num_active_days{{ name }}, 0) as num_active_days{{ name }},
        coalesce(recent.num_sessions{{ name }}, 0) as num_sessions{{ name }},
        coalesce(recent.num_qualifying_events{{ name }}, 0) as num_qualifying_events{{ name }},
        coalesce(recent.amount{{ name }}, 0) as amount{{ name }},
        {%- endfor %}
        {%- for column in [
            'num_amounts_30d', 'num_amounts_lookback', 'num_night_events_lookback',
            'num_weekend_events_lookback', 'gap_seconds_lookback', 'log_gap_sum_lookback',
            'max_gap_seconds_lookback', 'decayed_events_7d', 'decayed_active_days_7d',
            'decayed_events_30d', 'decayed_active_days_30d', 'decayed_events_90d',
            'decayed_active_days_90d', 'decayed_amount_30d'
        ] %}
        coalesce(recent.{{ column }}, 0) as {{ column }},
        {%- endfor %}
        user_history.num_events - user_history.num_night_events - user_history.num_morning_events
        - user_history.num_afternoon_events as num_evening_events,
        {{ seconds_between('user_history.last_event_at', 'night.observation_cutoff') }}
            as silence_seconds,
        {{ hours_between('user_history.last_event_at', 'night.observation_cutoff') }} / 24.0
            as recency_days,
        {{ hours_between('user_history.first_event_at', 'night.observation_cutoff') }} / 24.0
            as tenure_days,
        {{ hours_between('user_history.last_qualifying_at', 'night.observation_cutoff') }} / 24.0
            as qualifying_recency_days,
        {{ share('user_history.gap_seconds', 'user_history.num_events - 1') }} as mean_gap_seconds,
        {{ share('user_history.log_gap_sum', 'user_history.num_events - 1') }} as mean_log_gap,
        {{ share('user_history.log_gap_square_sum', 'user_history.num_events - 1') }}
            as mean_square_log_gap,
        {{ share('user_history.num_events', 'user_history.num_active_days') }} as mean_day_events,
        {{ share('user_history.day_events_square_sum', 'user_history.num_active_days') }}
            as mean_square_day_events,
        {{ share('user_history.days_between_sum', 'user_history.num_active_days - 1') }}
            as mean_days_between_active_days,
        {{ share('user_history.days_between_square_sum', 'user_history.num_active_days - 1') }}
            as mean_square_days_between
    from user_history
    cross join night
    left join recent on user_history.user_id = recent.user_id

),

final as (

    select
        timed.observation_cutoff,
        timed.user_id,
        {%- for days in ['_1d', '_7d', '_14d', '_30d', '_60d', '_90d', '_lookback', ''] %}
        cast(timed.num_events{{ days }} as bigint) as num_events{{ days }},
        {%- endfor %}
        {%- for days in ['_7d', '_14d', '_30d', '_60d', '_90d', '_lookback', ''] %}
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
        user_diversity.top_3_{{ name }}_share,
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
            as sessions_share_30d_of_90d,
        {{ share('timed.num_active_days_30d', 'timed.num_active_days_90d') }}
            as active_days_share_30d_of_90d,
        {{ share('timed.num_qualifying_events', 'timed.num_events') }} as qualifying_share,
        {{ share('timed.num_qualifying_events_30d', 'timed.num_events_30d') }}
            as qualifying_share_30d,
        cast(timed.qualifying_amount as double) as qualifying_amount,
        {{ share('timed.amount_30d', 'timed.num_amounts_30d') }} as mean_amount_30d,
        {%- for days in [7, 30, 90] %}
        timed.decayed_events_{{ days }}d,
        timed.decayed_active_days_{{ days }}d,
        {%- endfor %}
        timed.decayed_amount_30d,
        {%- for part in ['morning', 'afternoon', 'evening'] + weekdays() %}
        {{ share('timed.num_' ~ part ~ '_events', 'timed.num_events') }} as {{ part }}_share,
        {%- endfor %}
        {{ entropy_of([
            'timed.num_night_events', 'timed.num_morning_events', 'timed.num_afternoon_events',
            'timed.num_evening_events'
        ], 'timed.num_events') }} as part_of_day_entropy,
        {{ entropy_of([
            'timed.num_monday_events', 'timed.num_tuesday_events', 'timed.num_wednesday_events',
            'timed.num_thursday_events', 'timed.num_friday_events', 'timed.num_saturday_events',
            'timed.num_sunday_events'
        ], 'timed.num_events') }} as weekday_entropy,
        {{ share('timed.num_weekend_events_lookback', 'timed.num_events_lookback') }}
            as weekend_share_lookback,
        {{ share('timed.num_night_events_lookback', 'timed.num_events_lookback') }}
            as night_share_lookback,
        {{ share('timed.gap_seconds_lookback', 'timed.num_events_lookback') }}
            as mean_gap_seconds_lookback,
        {{ share('timed.log_gap_sum_lookback', 'timed.num_events_lookback') }}
            as mean_log_gap_lookback,
        cast(timed.max_gap_seconds_lookback as double) as max_gap_seconds_lookback,
        cast(timed.max_day_events as bigint) as max_day_events,
        timed.mean_day_events,
        sqrt(greatest(
            timed.mean_square_day_events - timed.mean_day_events * timed.mean_day_events, 0
        )) as std_day_events,
        timed.mean_days_between_active_days,
        cast(timed.max_days_between_active_days as bigint) as max_days_between_active_days,
        sqrt(greatest(
            timed.mean_square_days_between
            - timed.mean_days_between_active_days * timed.mean_days_between_active_days, 0
        )) as std_days_between_active_days,
        {{ share('timed.silence_seconds', 'timed.max_gap_seconds') }} as silence_over_max_gap,
        {{ share('timed.recency_days', 'timed.tenure_days') }} as recency_over_tenure,
        coalesce(timed.qualifying_recency_days, timed.tenure_days) as qualifying_recency_days
    from timed
    inner join user_diversity on timed.user_id = user_diversity.user_id

)

select * from final
