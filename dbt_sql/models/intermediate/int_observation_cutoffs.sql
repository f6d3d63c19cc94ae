{{ config(materialized='table') }}

with

events as (

    select * from {{ ref('stg_events') }}

),

span as (

    select max(occurred_at) as last_event_at from events

),

cutoffs as (

    {% for cutoff in var('observation_cutoffs') -%}
    select {{ timestamp_constant(cutoff) }} as observation_cutoff
    {% if not loop.last -%} union {%- endif %}
    {% endfor %}
),

dated as (

    select
        observation_cutoff,
        {{ utc_date('observation_cutoff') }} as cutoff_date
    from cutoffs

),

final as (

    select
        dated.observation_cutoff,
        dated.cutoff_date,
        dated.cutoff_date - {{ var('lookback_days') | int }} as lookback_start_date,
        dated.cutoff_date + {{ var('horizon_days') | int }} as horizon_end_date,
        dated.observation_cutoff = {{ timestamp_constant(var('train_cutoff')) }} as is_train_cutoff,
        coalesce(
            cast(dated.cutoff_date + {{ var('horizon_days') | int }} as timestamp)
            <= {{ utc_timestamp('span.last_event_at') }},
            false
        )
        -- A night knows what came before its own cutoff, also when nothing has come after it yet.
        or dated.cutoff_date + {{ var('horizon_days') | int }} <= max(dated.cutoff_date) over ()
            as is_label_complete
    from dated
    cross join span

)

select * from final
