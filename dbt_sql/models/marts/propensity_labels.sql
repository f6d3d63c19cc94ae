with

cutoffs as (

    select * from {{ ref('int_observation_cutoffs') }}

),

events as (

    select * from {{ ref('events_sessionized') }}

),

labels as (

    select * from {{ ref('labels') }}

),

targets as (

    select * from {{ ref('propensity_targets') }}

),

label_windows as (

    select
        observation_cutoff,
        cast(horizon_end_date as timestamp) as horizon_ended_at
    from cutoffs
    where is_label_complete

),

taken as (

    select distinct
        label_windows.observation_cutoff,
        events.{{ propensity_column() }} as target,
        events.user_id
    from events
    inner join label_windows
        on
            events.occurred_at >= label_windows.observation_cutoff
            and {{ utc_timestamp('events.occurred_at') }} < label_windows.horizon_ended_at
    where {{ is_propensity_event('events.event_type') }}

),

final as (

    select
        taken.observation_cutoff,
        taken.target,
        taken.user_id
    from taken
    inner join targets on taken.target = targets.target
    inner join labels
        on
            taken.observation_cutoff = labels.observation_cutoff
            and taken.user_id = labels.user_id

)

select * from final
