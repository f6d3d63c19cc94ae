{{ config(materialized='table', meta={'grain': 'user'}) }}

with

cutoffs as (

    select max(observation_cutoff) as observation_cutoff
    from {{ source('pipeline', 'night_cutoffs') }}

),

events as (

    select * from {{ ref('events_sessionized') }}

),

known_events as (

    select
        events.user_id,
        events.item_id,
        events.category,
        events.event_type
    from events
    inner join cutoffs on events.occurred_at < cutoffs.observation_cutoff

),

items as (

    {{ diversity('known_events', 'item_id') }}

),

categories as (

    {{ diversity('known_events', 'category') }}

),

event_types as (

    {{ diversity('known_events', 'event_type') }}

),

-- Every event has a type, so this has every user.
final as (

    select
        event_types.user_id,
        {%- for name, values in [
            ('item', 'items'), ('category', 'categories'), ('event_type', 'event_types')
        ] %}
        coalesce({{ values }}.num_values, 0) as num_{{ values }},
        coalesce({{ values }}.entropy, 0) as {{ name }}_entropy,
        coalesce({{ values }}.top_share, 0) as top_{{ name }}_share,
        coalesce({{ values }}.top_3_share, 0) as top_3_{{ name }}_share,
        {%- endfor %}
        {{ share('items.num_events - items.num_values', 'items.num_events') }} as repeat_item_share
    from event_types
    left join items on event_types.user_id = items.user_id
    left join categories on event_types.user_id = categories.user_id

)

select * from final
