with

cutoffs as (

    select * from {{ ref('int_observation_cutoffs') }}

),

events as (

    select * from {{ ref('events_sessionized') }}

),

train_window as (

    select
        observation_cutoff,
        cast(lookback_start_date as timestamp) as lookback_started_at
    from cutoffs
    where is_train_cutoff

),

value_counts as (

    select
        events.{{ propensity_column() }} as target,
        count(*) as num_events
    from events
    inner join train_window
        on
            {{ utc_timestamp('events.occurred_at') }} >= train_window.lookback_started_at
            and events.occurred_at < train_window.observation_cutoff
    where
        {{ is_propensity_event('events.event_type') }}
        and events.{{ propensity_column() }} is not null
    group by events.{{ propensity_column() }}

),

final as (

    select
        cast(row_number() over (order by num_events desc, target asc) as integer) as target_rank,
        target,
        num_events
    from value_counts
    qualify target_rank <= {{ var('num_targets') | int }}

)

select * from final
