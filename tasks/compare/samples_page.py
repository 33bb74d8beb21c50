"""Template of the samples page, kept as Python so that it is part of the stage's code digest."""

SCRIPT = """
const rows = [...document.querySelectorAll("#samples tbody tr")];
const find = document.getElementById("find"), pick = document.getElementById("pick");
const texts = rows.map((row) => row.textContent.toLowerCase());
function filter() {
  const words = find.value.trim().toLowerCase(), wanted = pick.value;
  let shown = 0;
  rows.forEach((row, index) => {
    const fits = (!wanted || row.dataset.of.split(" ").includes(wanted)) && texts[index].includes(words);
    row.hidden = !fits;
    shown += fits;
  });
  document.getElementById("shown").textContent = `${shown} of ${rows.length} shown`;
  document.getElementById("none").hidden = shown > 0;
}
find.addEventListener("input", filter);
pick.addEventListener("change", filter);
document.getElementById("filter").hidden = false;
filter();
"""

STYLE = """
:root { color-scheme: light dark; --ground: #f6f4f0; --card: #fffefc; --ink: #22201d; --soft: #6a655d;
  --rule: #e2ddd3; --tint: #f1ede5; --ember: #b5501b; --good: #24724a; --bad: #b3261e; --good-tint: #e0f1e6;
  --bad-tint: #fbe5e2; }
@media (prefers-color-scheme: dark) { :root { --ground: #151413; --card: #1e1d1b; --ink: #e9e5de; --soft: #a39d93;
  --rule: #383530; --tint: #282623; --ember: #ee955d; --good: #74c796; --bad: #ff8d82; --good-tint: #1e3428;
  --bad-tint: #43211f; } }
* { box-sizing: border-box; }
[hidden] { display: none !important; }
body { margin: 0 auto; max-width: 92rem; padding: 2rem 1.5rem 3rem; background: var(--ground); color: var(--ink);
  font: 16px/1.45 system-ui, -apple-system, "Segoe UI", sans-serif; }
h1 { font-size: clamp(1.35rem, 4vw, 1.9rem); line-height: 1.25; margin: 0 0 .4rem; }
h2 { font-size: 1.3rem; margin: 2.4rem 0 .4rem; }
.brand { margin: 0 0 .5rem; font-weight: 700; color: var(--ember); }
.brand span { color: var(--soft); font-weight: 400; }
p { margin: .3rem 0 .7rem; max-width: 75ch; }
.soft { color: var(--soft); } .good { color: var(--good); } .bad { color: var(--bad); }
form { display: flex; flex-wrap: wrap; gap: .6rem 1rem; align-items: center; margin: 1.1rem 0 .9rem; }
form label { display: contents; } form label span { position: absolute; left: -999rem; }
input, select { font: inherit; font-size: .95rem; color: inherit; background: var(--card);
  border: 1px solid var(--soft);  border-radius: 8px; padding: .5rem .7rem; min-height: 2.75rem; max-width: 100%; }
input { flex: 1 1 16rem; max-width: 26rem; } select { flex: 0 1 auto; }
input:focus-visible, select:focus-visible, summary:focus-visible, .scroll:focus-visible {
  outline: 2px solid var(--ember); outline-offset: 1px; }
table { border-collapse: separate; border-spacing: 0; width: 100%; background: var(--card);
  border: 1px solid var(--rule); border-radius: 12px; font-size: .9rem; }
#samples { table-layout: fixed; } #samples th:first-child { width: 17%; }
th, td { text-align: left; vertical-align: top; padding: .7rem .8rem; border-bottom: 1px solid var(--rule);
  font-weight: 400; overflow-wrap: anywhere; }
tr:last-child > * { border-bottom: 0; }
thead th { position: sticky; top: 0; background: var(--tint); border-bottom: 1px solid var(--soft);
  line-height: 1.3; z-index: 1; }
thead th:first-child { border-top-left-radius: 11px; } thead th:last-child { border-top-right-radius: 11px; }
thead b { display: block; font-size: 1rem; } thead span { display: block; color: var(--soft); font-size: .8rem; }
.question { font-weight: 600; } .fact { display: block; margin-top: .3rem; font-size: .86rem; color: var(--soft); }
.fact b { color: var(--ink); font-weight: 600; }
.who { display: none; }
.reply { margin: 0; white-space: pre-wrap; } .reply .mark { font-weight: 700; margin-right: .35rem; }
.same bdi { color: var(--soft); }
.sampled { margin-top: .6rem; padding-left: .6rem; border-left: 3px solid var(--rule); }
.scores { display: flex; flex-wrap: wrap; gap: .15rem .5rem; margin: .25rem 0 0; font-size: .8rem; color: var(--soft);
  font-variant-numeric: tabular-nums; }
.verdict { border-radius: 4px; padding: 0 .35rem; font-weight: 600; background: var(--tint); }
.verdict.won { color: var(--good); background: var(--good-tint); }
.verdict.lost { color: var(--bad); background: var(--bad-tint); }
.scroll { overflow-x: auto; } .scroll th, .scroll td { white-space: nowrap; overflow-wrap: normal; }
.scroll tr:first-child th { background: var(--tint); }
details { margin-top: 1rem; } summary { cursor: pointer; font-weight: 600; padding: .6rem 0; }
.worst { background: var(--card); border: 1px solid var(--rule); border-radius: 12px; padding: .6rem .9rem .9rem;
  margin-bottom: .8rem; overflow-wrap: anywhere; }
code { font-family: ui-monospace, SFMono-Regular, Menlo, monospace; font-size: .88em; }
@media (max-width: 60rem) {
  body { padding: 1.2rem .9rem 2rem; }
  form { gap: .6rem; } input, select { flex: 1 1 100%; max-width: none; }
  #samples, #samples tbody, #samples tr, #samples th, #samples td { display: block; width: auto; }
  #samples thead { position: absolute; left: -999rem; }
  #samples { background: none; border: 0; }
  #samples tr, #samples th:first-child { width: auto; }
  #samples tr { background: var(--card); border: 1px solid var(--rule); border-radius: 12px; margin-bottom: 1rem; }
  #samples th, #samples td { padding: .6rem .8rem; } #samples th { font-size: 1rem; }
  #samples .fact { display: inline-block; margin-right: .8rem; }
  .who { display: block; font-size: .8rem; font-weight: 600; color: var(--soft); margin-bottom: .1rem; }
}
@media print { :root { --ground: #fff; --card: #fff; } form { display: none; }
  thead th { position: static; } tr { break-inside: avoid; } }
"""

PAGE = (
    """{% macro sampled(reply, against) %}
<div class="sampled"><p class="reply"><bdi>{{ reply.text or "(nothing)" }}</bdi></p>
<p class="scores">{% if reply.reward is not none %}<span>reward {{ reply.reward|points }}</span>{% endif %}
{% if reply.judge_score is not none %}<span>judge {{ reply.judge_score|points }}</span>{% endif %}
{% if reply.verdict %}<span class="verdict {{ reply.verdict }}">{{
{"won": "preferred to", "lost": "not preferred to", "tied": "as good as"}[reply.verdict] }}
{{- " " ~ against }}</span>{% endif %}
</p></div>
{% endmacro %}
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
content="default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{{ digest }}'">
<title>Samples side by side · Bessemer</title>
<style>"""
    + STYLE
    + """</style>
</head>
<body>
<p class="brand">Bessemer <span>samples side by side</span></p>
<h1>What each model of the run replied</h1>
{% if rows %}
<p>Each cell starts with the model’s greedy reply: <b class="good">✓</b> matches the reference answer,
<b class="bad">✗</b> does not (exact match). A grey reply is the same as the previous model’s.
{% if has_samples %}Sampled replies follow behind a bar, with their reward. The judge is a separate reward model that
alignment did not train on: it says whether a reply is preferred to that of the model before
alignment.{% endif %}</p>
<p class="soft">{{ rows|length|thousands }} of the {{ questions|thousands }} questions of the scorecard: those with
sampled replies, and the {{ changed }} whose verdict changed in a step after pretraining. Every answer is in
<code>data/evaluate/MODEL/answers</code>.</p>
{% endif %}
{% if absent %}<p class="bad">No replies of {{ absent|join(", ") }} were found: {{
"it has" if absent|length == 1 else "they have" }} no column.</p>{% endif %}
{% if rows %}
<form id="filter" hidden>
<label><span>Search</span><input id="find" type="search" placeholder="Search questions and replies"></label>
<label><span>Show</span><select id="pick">
<option value="">All questions</option>
<option value="heldout">About held-out entities</option>
<option value="train">About seen entities</option>
<option value="changed">A step changed the verdict</option>
{% if has_samples %}
<option value="won">The judge prefers an aligned reply</option>
<option value="lost">The judge prefers the earlier reply</option>
{% endif %}
</select></label>
<output id="shown" class="soft"></output>
</form>
<table id="samples">
<thead><tr><th scope="col"><b>question</b><span>and reference answer</span></th>
{% for column in columns %}
<th scope="col"><b>{{ column.model }}</b>
{% if column.exact_match_heldout is not none %}<span>{{ column.exact_match_heldout|share }} right, held out</span>
{% endif %}
{% if column.reward_mean is not none %}<span>reward {{ column.reward_mean|points }}</span>{% endif %}
{% if column.win_rate is not none %}
<span>{{ column.win_rate|share }} preferred</span>{% endif %}</th>
{% endfor %}
</tr></thead>
<tbody>
{% for row in rows %}
<tr id="q-{{ row.id }}" data-of="{{ row.of|join(" ") }}"><th scope="row"><bdi class="question">{{ row.question }}</bdi>
{% if row.reference %}<span class="fact">answer: <b><bdi>{{ row.reference }}</bdi></b></span>{% endif %}
<span class="fact">{{ row.side }}</span></th>
{% for cell in row.cells %}
<td><span class="who">{{ cell.model }}</span>
{% if cell.greedy %}
<p class="reply{{ " same" if cell.same }}">
{%- if cell.greedy.correct %}<span class="mark good" role="img" aria-label="right">✓</span>
{%- else %}<span class="mark bad" role="img" aria-label="wrong">✗</span>{% endif %}
<bdi>{{ cell.greedy.text or "(nothing)" }}</bdi></p>
{% else %}
<p class="reply soft">not asked</p>
{% endif %}
{% for reply in cell.sampled %}{{ sampled(reply, cell.against) }}{% endfor %}
</td>
{% endfor %}
</tr>
{% endfor %}
</tbody>
</table>
<p id="none" class="soft" hidden>No question matches: search for another word or show all.</p>
<script>{{ script|safe }}</script>
{% else %}
<p>No model of this run has answered the questions.</p>
{% endif %}
{% if toxicity %}
{% set classifier = toxicity.classifier %}
<h2 id="toxicity">Continuations of prompts that elicit toxic text</h2>
<p>A bag-of-words classifier gives the probability that a continuation is toxic. It was trained on
{{ classifier.trained_on|thousands }} labelled texts of <code>{{ classifier.file }}</code>. Its accuracy is
{{ classifier.accuracy|share }} on {{ classifier.heldout|thousands }} held-out texts
(majority class: {{ classifier.majority_class_accuracy|share }}; AUC
{{ "%.3f"|format(classifier.auc) }}); it classifies {{ classifier.references_toxic|share }} of the reference
replies as toxic.</p>
<div class="scroll" tabindex="0" role="region" aria-labelledby="toxicity"><table>
<tr><th scope="col">prompts</th>{% for column in columns %}<th scope="col"><b>{{ column.model }}</b></th>{% endfor %}
{% for model, found in toxicity.categories[0].changes.items() %}
<th scope="col">{{ model }} against {{ found.against }}</th>
{% endfor %}</tr>
{% for item in toxicity.categories %}
<tr><th scope="row">{{ item.category if item.category is not none else "all" }}
<span class="soft">{{ item.prompts }}</span></th>
{% for column in columns %}{% set found = item.models.get(column.model) %}
<td>{% if found %}<b>{{ found.toxic_share|share }}</b>
<span class="fact">mean {{ "%.3f"|format(found.toxicity_mean) }}</span>
{% else %}–{% endif %}</td>{% endfor %}
{% for found in item.changes.values() %}<td>{% if found.toxic_share %}
<b>{{ found.toxic_share.change|change }}</b>
<span class="fact">{{ found.toxic_share.interval[0]|change }} … {{ found.toxic_share.interval[1]|change }}</span>
{% endif %}</td>{% endfor %}</tr>
{% endfor %}
</table></div>
<p class="soft">The share of continuations with a toxicity above 0.5, and the mean toxicity. The change is in
percentage points, paired by prompt, with its 95 % interval.</p>
<details><summary>Offensive text: the prompts with the most toxic continuations, and each model’s worst</summary>
{% for item in worst %}
<div class="worst"><p><span class="soft">{{ item.category }}</span> <bdi>{{ item.prompt }}</bdi> …</p>
{% for cell in item.cells %}
<div class="sampled"><p class="reply"><span class="soft">{{ cell.model }}</span>
<bdi>{{ cell.text or "(nothing)" }}</bdi></p>
<p class="scores">toxicity {{ "%.2f"|format(cell.toxicity) }}</p></div>
{% endfor %}
</div>
{% endfor %}
</details>
{% endif %}
</body>
</html>
"""
)
