"""The Jinja template of the validation report, kept in Python so that the code hash of the stage includes it."""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Bessemer: data validation</title>
<style>
:root { --ground: #faf9f6; --card: #ffffff; --ink: #1f2328; --soft: #5d6570; --rule: #dedbd3; --steel: #3b6ea5;
  --pale: #b9cfe6; --good: #2c7a4b; --bad: #b3261e; color-scheme: light dark; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #15171a; --card: #1d2024; --ink: #e6e4df; --soft: #a2a8b0; --rule: #343941; --steel: #7fb0e4;
    --pale: #3a526d; --good: #6cc08b; --bad: #ff8a80; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 2.5rem 1.25rem 4rem; background: var(--ground); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 .3rem; } h2 { font-size: 1.25rem; margin: 0 0 .2rem; }
h3 { font-size: .95rem; margin: 1.4rem 0 .4rem; } p { margin: .2rem 0 .6rem; } .soft { color: var(--soft); }
.good { color: var(--good); } .bad { color: var(--bad); } .strong { font-weight: 650; }
section { background: var(--card); border: 1px solid var(--rule); border-radius: 10px;
  padding: 1.2rem 1.4rem; margin-top: 1.4rem; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; }
th { text-align: left; font-weight: 600; color: var(--soft); }
th, td { padding: .3rem .8rem .3rem 0; vertical-align: top; border-bottom: 1px solid var(--rule); }
tr:last-child td { border-bottom: 0; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.name { white-space: nowrap; }
td.verdict { width: 5.5rem; white-space: nowrap; } td.observed { color: var(--soft); text-align: right; }
.bar { display: flex; height: .8rem; width: 100%; min-width: 8rem; margin-top: .35rem; }
.bar i { display: block; background: var(--steel); } .bar i + i { background: var(--pale); }
.bar.half { position: relative; } .bar.half::after { content: ""; position: absolute; left: 50%; top: -.2rem;
  height: 1.2rem; border-left: 2px solid var(--ink); }
.key { display: inline-block; width: .7rem; height: .7rem; margin: 0 .3rem 0 .9rem; background: var(--steel); }
.key.second { background: var(--pale); }
ul.rows { margin: .3rem 0; padding: 0; list-style: none; font: .84rem/1.5 ui-monospace, monospace;
  overflow-wrap: anywhere; }
ul.rows li { padding: .25rem 0 .25rem .8rem; border-left: 3px solid var(--rule); margin-bottom: .35rem; }
summary { cursor: pointer; font-weight: 600; margin-top: 1.2rem; }
nav a { margin-right: 1rem; } a { color: var(--steel); }
.scroll { overflow-x: auto; }
</style>
</head>
<body>
<h1>Data validation</h1>
<p>
{% if empty %}
<span class="bad strong">✗ No row is kept of {{ empty|join(", ") }}; the run stopped here.</span>
{% endif %}
{% if failed %}
<span class="bad strong">✗ {{ failed }} of {{ checked }} expectations are not met; the run stopped here.</span>
{% elif not empty %}
<span class="good strong">✓ All {{ checked }} expectations are met.</span>
{% endif %}
{{ rejected|thousands }} {{ "row was" if rejected == 1 else "rows were" }} rejected, each with a reason.
{% if marked %}
Personal data was marked in {{ marked|thousands }} {{ "row" if marked == 1 else "rows" }}.
{% endif %}
{% if shortened %}
A message without an answer was removed in {{ shortened|thousands }} {{ "row" if shortened == 1 else "rows" }}.
{% endif %}
</p>
{% if failed %}
<ul>
{% for item in summaries %}{% for verdict in item.verdicts if not verdict.success %}
<li><a href="#{{ item.table }}">{{ item.table }}</a>: expected that {{ verdict.description }};
found {{ verdict.observed }}</li>
{% endfor %}{% endfor %}
</ul>
{% endif %}
<nav>{% for item in summaries %}<a href="#{{ item.table }}">{{ item.table }}</a>{% endfor %}
{% if judgement_rows %}<a href="#judgements">judgements of the rankings</a>{% endif %}</nav>
<section>
<div class="scroll"><table>
<tr><th></th><th class="number" colspan="3">rows</th>
<th class="number" colspan="3">characters per row</th><th></th></tr>
<tr><th>table</th><th class="number">read</th><th class="number">kept</th><th class="number">rejected</th>
<th class="number">shortest</th><th class="number">mean</th><th class="number">longest</th>
<th class="number">expectations met</th></tr>
{% for item in summaries %}
<tr><td>{{ item.table }}</td>
<td class="number">{{ item.read|thousands }}</td><td class="number">{{ item.kept|thousands }}</td>
<td class="number">{{ item.rejected|thousands }}</td>
<td class="number">{{ item.characters.shortest|thousands }}</td>
<td class="number">{{ item.characters.mean|thousands }}</td>
<td class="number">{{ item.characters.longest|thousands }}</td>
<td class="number {{ 'bad' if item.failed else 'good' }}">
{{ item.verdicts|length - item.failed }} of {{ item.verdicts|length }}</td></tr>
{% endfor %}
</table></div>
<p class="soft">Rows read = rows kept + rows rejected, for every table. Rejected rows are stored beside this report in
<code>rejected/</code>, with a column <code>reason</code>. They are stored as they were read: personal data is marked in
kept rows only.</p>
</section>
{% for item in summaries %}
<section id="{{ item.table }}">
<h2>{{ item.table }}</h2>
<p class="soft">{{ item.kept|thousands }} rows kept, {{ item.rejected|thousands }} rejected</p>
<h3>Sources
<span class="soft"><span class="key"></span>train<span class="key second"></span>held out</span></h3>
<div class="scroll"><table>
<tr><th style="width:12rem">source</th><th class="number" style="width:6rem">train</th>
<th class="number" style="width:6rem">held out</th><th></th></tr>
{% for row in item.sources %}
<tr><td>{{ row.source }}</td><td class="number">{{ row.train|thousands }}</td>
<td class="number">{{ row.heldout|thousands }}</td>
<td><div class="bar"><i style="width:{{ '%.2f'|format(100 * row.train / (item.kept or 1)) }}%"></i><i
style="width:{{ '%.2f'|format(100 * row.heldout / (item.kept or 1)) }}%"></i></div></td></tr>
{% endfor %}
</table></div>
<h3>Expectations</h3>
<div class="scroll"><table>
{% for verdict in item.verdicts|sort(attribute="success") %}
<tr><td class="verdict {{ 'good' if verdict.success else 'bad strong' }}">
{{ "✓ met" if verdict.success else "✗ not met" }}</td>
<td title="{{ verdict.type }}">{{ verdict.description }}</td><td class="observed">
{%- if not verdict.observed.startswith("0 of ") %}{{ verdict.observed }}{% endif %}</td></tr>
{% endfor %}
</table></div>
<h3>Limits</h3>
<div class="scroll"><table>
{% for limit in item.limits %}
<tr><td class="name"><code>validate.{{ limit.setting }}</code></td><td>
{{- "no limit" if limit.value is none else limit.value|thousands }}
<span class="soft">({{ limit.origin }})</span></td><td class="observed">{{ limit.found }}</td></tr>
{% endfor %}
</table></div>
{% if item.languages %}
<h3>Languages</h3>
<div class="scroll"><table>
<tr><th>language</th><th class="number">kept</th><th class="number">rejected</th><th>rules of the language</th></tr>
{% for row in item.languages %}
<tr><td>{{ "not known" if row.language == "und" else row.language }}</td>
<td class="number">{{ row.kept|thousands }}</td><td class="number">{{ row.rejected|thousands }}</td>
<td>{{ row.rules }}</td></tr>
{% endfor %}
</table></div>
{% endif %}
<h3>Rejected rows</h3>
{% if not item.reasons %}
<p class="soft">None.</p>
{% endif %}
{% for reason in item.reasons %}
<p><span class="strong">{{ reason.count|thousands }} ×</span> {{ reason.reason }}
<span class="soft">({% for part in reason.rejected %}{{ part.source }}{{ " " ~ part.language if part.language }}
{{ part.count|thousands }}{{ "" if loop.last else "; " }}{% endfor %})</span></p>
<ul class="rows">{% for example in reason.examples %}<li>{{ example }}</li>{% endfor %}</ul>
{% endfor %}
{% if item.marked %}
<h3>Marked personal data</h3>
<p>In {{ item.marked_rows|thousands }} kept {{ "row" if item.marked_rows == 1 else "rows" }}, listed in
<code>report/changed.jsonl</code>:
{% for kind, count in item.marked.items() %}
<span class="strong">{{ count|thousands }} ×</span> &lt;{{ kind|upper }}&gt;{{ "." if loop.last else "," }}
{% endfor %}
</p>
{% endif %}
{% if item.removed %}
<h3>Removed messages</h3>
<p>In {{ item.shortened_rows|thousands }} kept {{ "row" if item.shortened_rows == 1 else "rows" }}, listed in
<code>report/changed.jsonl</code>:
{% for role, count in item.removed.items() %}
<span class="strong">{{ count|thousands }} ×</span> {{ "an empty system message" if role == "system"
else "a message of the user that no answer follows" }}{{ "." if loop.last else "," }}
{% endfor %}
</p>
{% endif %}
<details>
<summary>Examples of kept rows</summary>
<ul class="rows">{% for sample in item.samples %}<li>{{ sample }}</li>{% endfor %}</ul>
</details>
</section>
{% endfor %}
{% if judgement_rows %}
<section id="judgements">
<h2>Judgements of the rankings</h2>
<p class="soft">The {{ judgement_rows|sum(attribute="rankings")|thousands }} kept rankings, by source and kind of
judgement.</p>
<h3>Rankings by number of responses</h3>
<div class="scroll"><table>
<tr><th>source</th><th>judged by</th>
{% for size in sizes %}<th class="number">{{ size }} responses</th>{% endfor %}
<th class="number">all</th><th class="number">ties only</th></tr>
{% for row in judgement_rows %}
<tr><td class="name">{{ row.source }}</td><td class="name">{{ row.judged_by }}</td>
{% for size in sizes %}<td class="number">{{ row.responses.get(size, 0)|thousands }}</td>{% endfor %}
<td class="number">{{ row.rankings|thousands }}</td><td class="number">{{ row.undecided|thousands }}</td></tr>
{% endfor %}
</table></div>
<h3>Agreement between raters: Krippendorff’s α</h3>
<div class="scroll"><table>
<tr><th>source</th><th>judged by</th><th class="number">annotators</th>
<th class="number">judged by several</th><th class="number">judgements</th><th class="number">α</th><th></th></tr>
{% for row in judgement_rows %}
<tr><td class="name">{{ row.source }}</td><td class="name">{{ row.judged_by }}</td>
<td class="number">{{ row.annotators|thousands }}</td>
<td class="number">{{ row.units|thousands }} {{ row.unit }}{{ "" if row.units == 1 else "s" }}</td>
<td class="number">{{ row.judgements|thousands }}</td>
{% if row.alpha is none %}
<td class="number">–</td><td class="soft">{% if row.units %}all judgements equal{% elif row.unnamed == row.rankings %}
no annotator is named{% else %}no item has two annotators{% endif %}</td>
{% else %}
<td class="number strong">{{ "%.2f"|format(row.alpha)|replace("-", "−") }}</td>
<td class="soft name">{{ row.label }}</td>
{% endif %}</tr>
{% endfor %}
</table></div>
<p class="soft">1 is perfect agreement, 0 is chance. Krippendorff requires 0.8, and 0.667 for tentative conclusions.
Ranks are compared pair by pair on an ordinal scale, scores response by response on an interval scale. Disagreement
rejects no row; it shows how reliable a ranking is.</p>
<h3>Length bias</h3>
<div class="scroll"><table>
<tr><th>source</th><th>judged by</th>
<th class="number">pairs</th><th class="number">longer preferred</th>
<th style="width:10rem"></th><th class="number">rating–length r</th></tr>
{% for row in judgement_rows %}
<tr><td class="name">{{ row.source }}</td><td class="name">{{ row.judged_by }}</td>
<td class="number">{{ row.pairs|thousands }}</td>
{% if row.longer_preferred is none %}
<td class="number">–</td><td></td>
{% else %}
<td class="number strong">{{ "%.1f"|format(100 * row.longer_preferred) }} %</td>
<td><div class="bar half"><i style="width:{{ '%.2f'|format(100 * row.longer_preferred) }}%"></i><i
style="width:{{ '%.2f'|format(100 - 100 * row.longer_preferred) }}%"></i></div></td>
{% endif %}
<td class="number">{% if row.rating_length_correlation is none %}–{% else %}
{{ "%.2f"|format(row.rating_length_correlation)|replace("-", "−") }}{% endif %}</td></tr>
{% endfor %}
</table></div>
<p class="soft">Pairs of responses of which one is preferred. The share leaves out pairs of equal length; 50 % (the
line) means no bias. r is Pearson’s correlation of a response’s mean score with its length in characters; ranks have
none. A reward model learns such a bias.</p>
</section>
{% endif %}
</body>
</html>
"""
