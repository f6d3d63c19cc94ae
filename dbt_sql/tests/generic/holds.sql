{#- Every row satisfies the expression. -#}
{% test holds(model, expression) %}

select *
from {{ model }}
where ({{ expression }}) is not true

{% endtest %}
