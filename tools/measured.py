"Write measured.qmd from the results in bench/results/: what was measured, with which command, on which machine."
import json
from pathlib import Path

from ftnb.base import gib

root = Path(__file__).parent.parent
def load(n):
    p = root/'bench/results'/f'{n}.json'
    return json.loads(p.read_text()) if p.exists() else None
def table(rows, cols):
    return '\n'.join(['| '+' | '.join(cols)+' |', '|'+'---|'*len(cols), *('| '+' | '.join(str(r[c]) for c in cols)+' |' for r in rows)])

def adapters(r, old):
    "The section on combined adapters, those trained as far as they need and those trained on: of each way the setting that keeps most of the least kept"
    share = lambda x: 'none' if x is None else f'{100*x:.0f} %'
    names = [k for k in (r or old)['scores'] if k!='base']
    made = lambda r: [o for o in r['grid'] if o['how'] not in ('base', 'alone')]
    rank = lambda o: (o['least'], sum(o[f'{k} kept'] or 0 for k in names))
    weight = lambda o: ' '.join(dict.fromkeys(w.split('=')[1] for w in o['weights'].split()))
    def grid(r):
        best = sorted((max((o for o in made(r) if o['how']==w), key=rank) for w in dict.fromkeys(o['how'] for o in made(r))), key=rank, reverse=True)
        return table([dict(way=o['how'], weight=weight(o), density=o['density'] or '', **{f'{k} kept': share(o[f'{k} kept']) for k in names}) for o in best], ['way', 'weight', 'density', *(f'{k} kept' for k in names)])
    def about(r):
        own = ', '.join(f'{k} {share(r["scores"][k][k])}'+(f' after {r["adapters"][k]["steps"]} steps' if 'adapters' in r else '') for k in names)
        return f'{own} of its {r["rows"][names[0]]} held-out rows; on the other tasks {share(max(r["scores"][a][b] for a in names for b in names if a!=b))} at most, the base {share(max(max(o.values()) for k,o in r["scores"].items() if k=="base"))}. Of each way the best of {len(made(r))} settings in all, on {r["grid_rows"]} rows of each task'
    text = f'## Adapters combined\n\n`{(r or old)["command"]}`. Three LoRA adapters of rank 8 on smollm2-135m, each on 240 rows of one format: a code, a card of lines, a JSON ticket. *Kept* is the share of the single adapter\'s score that a combination has left.'
    if r: text += f'\n\nEach adapter is the first checkpoint that answers 95 % of its own validation rows, at a learning rate of {r["learning_rate"]:g}: {about(r)}:\n\n'+grid(r)
    if c := r and r.get('confirmed'):
        line = lambda o: f'`{o["how"]}` with weights of {weight(o)}'+(f' and density {o["density"]:g}' if o['density'] else '')+f' keeps '+', '.join(f'{share(o["kept"][k])} of {k}' for k in names)
        text += f'\n\nOn the {c["ties"]["rows"]} held-out rows that the grid did not see, {line(c["ties"])}'+(f'; {line(c["any"])}' if c['any']['how']!=c['ties']['how'] else '')+f'. {"Ties keeps at least 80 % of each adapter." if r["ties_keeps_80"] else "No ties merge of the grid keeps 80 % of each adapter."}'
    if old: text += f'\n\nTrained on, {old["steps"]} steps at 1e-3, to a loss of 0.0005: {about(old)}:\n\n'+grid(old)+f'\n\nAdapters trained that far do not combine: the least kept of the three tasks is {share(max(o["least"] for o in made(old)))} at best.'
    return text

def serve(r):
    "The section on exported files behind their server: each file for each number of clients, then what a setting changes"
    ms = lambda x: '' if x is None else f'{1000*x:,.0f} ms'
    num = lambda x, f: '' if x is None else format(x, f)
    def line(o, **more): return {'file': o['format'], 'clients': o['clients'], **more, 'first token': ms(o['first_p50']), '95 % within': ms(o['first_p95']), 'tokens/s of one': num(o['one'], '.0f'), 'of all': num(o['all'], '.0f'), 'memory': gib(o['memory']), 'KL': num(o.get('kl'), '.4f'), r['measure'] or 'score': num(o.get('score'), '.0%')}
    own, other = ([o for o in r['rows'] if bool(o['changed'])==c] for c in (False, True))
    names = dict(n_threads='threads', n_batch='n_batch', max_model_len='context')
    text = f'## Serving\n\n`{r["command"]}`, {r["engine"]} on {r["hardware"]["cpu"]}, {r["hardware"]["cores"]} cores: {r["prompts"]} held-out prompts, answers of up to {r["max_tokens"]} tokens, {r["repeats"]} repeats, no prompt kept in a cache; KL and score are those of the certificate.\n\n'
    first = [line(o) for o in own]
    text += table(first, [*first[0]])
    if other:
        more = [line(o, changed=f'{(k := names[o["changed"]])} {o[k]}') for o in other]
        text += '\n\nOne setting changed at a time:\n\n'+table(more, [k for k in more[0] if k not in ('KL', r['measure'] or 'score')])
    return text

def main():
    out = ['---\ntitle: Measured\n---\n\nRatios between two things run in turn, medians of several runs; the files with every run, versions and processor lie in `bench/results/`. Machines are noisy: a ratio carries over, a time does not.\n']
    if r := load('demo'): out.append(f'## The demo\n\n`{r["command"]}` in a fresh clone, after installation, {r["hardware"]}: {r["text"]}\n\n'+table(r['metrics'], ['metric', 'base', 'tuned', 'difference', 'interval']))
    if r := load('speed'): out.append(f'## Training speed\n\n`{r["command"]}`. Trained tokens per second inside `train()` from step 3 on, against plain `SFTTrainer` with its defaults on the same labels, adapter, batch and rows: **{r["ratio"]} times** '
        f'(runs: {", ".join(map(str, r["ratios"]))}); held-out loss after the same tokens {r["loss_ratio"]} times.')
    if r := load('overhead'): out.append(f'## Pipeline overhead\n\n`{r["command"]}`. `ftnb run` (five notebooks, each in its own kernel, with gates, plan, verification of the export and records) against one plain TRL script doing the same work: **{r["ratio"]} times** the time.')
    if r := load('planner'):
        f, t = r['paper'], sorted(r['trace_seconds'])
        out.append(f'## The planner\n\n`{r["command"]}`. The instant path over {f["calls"]} different steps in fresh processes: median {f["median_ms"]:.1f} ms, 90 % under {f["p90_ms"]:.1f} ms, longest {f["most_ms"]:.1f} ms, without torch. The trace of Llama 3.1 8B in a process that has traced before: {t[len(t)//2]:.1f} s. Resident memory of the demo on a CPU, stage by stage, each in a process of its own:\n\n'
            + table([dict(stage=o['stage'], forecast=gib(o['forecast']), measured=gib(o['measured']), error=f'{100*(o["forecast"]/o["measured"]-1):+.0f} %') for o in (r.get('run') or {}).get('stages', [])], ['stage', 'forecast', 'measured', 'error']))
    if r := load('panel'):
        f, c = r['first_paint'], r['change']
        out.append(f'## The plan panel\n\n`python bench/panel.py`. From the import to the first picture, in a fresh process: {f["median_seconds"]:.2f} s (longest of {f["processes"]}: {f["most_seconds"]:.2f} s). A change of a field, the GPU or the rows, over {c["changes"]} changes on three models and two cards: median {c["median_ms"]:.0f} ms, 90 % under {c["p90_ms"]:.0f} ms, longest {c["most_ms"]:.0f} ms. A page that takes a search follows 150 ms after the last change. No torch is loaded.')
    if r := load('lab'): out.append(f'`python bench/lab.py`, in a JupyterLab that is warm, with the browser: from running the cell that imports it to the picture on the page {r["first_paint"]["median_seconds"]} s (runs: {", ".join(map(str, r["first_paint"]["seconds"]))}); from a keystroke to the new bar median {r["change"]["median_ms"]} ms, 90 % under {r["change"]["p90_ms"]} ms.')
    if (r := load('adapters')) or load('adapters_overtrained'): out.append(adapters(r, load('adapters_overtrained')))
    if r := load('merge'):
        mib = lambda o: f'{(o["peak"]-o["start"])/2**20:,.0f} MiB'
        n = r['noise']['bfloat16']['held_to_float32']
        out.append(f'## Merging\n\n`{r["command"]}`. {r["model"]} with LoRA of rank 16, files of {r["shard"]}: the whole merge in float32 takes {mib(r["whole"])} beside Python and its libraries, shard by shard {mib(r["shards"])}; the files are {"equal, tensor for tensor" if r["equal"] else "not equal"}. Where float32 does not fit, the trained model is held in 16 bits to be compared with, which by itself moves it by KL {n["kl"]:.4f}, top-1 {n["top1"]:.3f} (bfloat16, {r["noise"]["tokens"]:,} tokens).')
    if r := load('serve'): out.append(serve(r))
    if r := load('prepare'): out.append(f'## Stage 1 as rows grow\n\n`{r["command"]}`. Read, normalise, scan, split, de-duplicate, tokenise, inspect, prove; peak memory of the process, of which {r["runs"][0]["before_mb"]} MB are there before the first row. What grows is the index of near duplicates: about 1 KB a row.\n\n'
        + table([dict(rows=f'{o["rows"]:,}', **{'rows/s': o['rows_per_second'], 'peak MB': f'{o["peak_mb"]:,}', 'file MB': o['file_mb']}, **{k: f'{100*v:.0f} %' for k,v in o['share'].items()}) for o in r['runs']], ['rows', 'rows/s', 'peak MB', 'file MB', *r['runs'][0]['share']]))
    if r := load('near'):
        rows = [dict(set=k, threshold=o['threshold'], recall=f'{100*o["recall_known"]:.1f} %', precision=f'{100*o["precision_known"]:.1f} %') for k,os in r['known'].items() for o in os if o['threshold'] in (.6, .7)]
        out.append('## Near duplicates\n\n`bench/near.py`: one edited copy of each question (words, numbers, case, punctuation, clauses). Questions of under eight counting shingles are compared by their words only, which is why the short questions of MedQuAD are found less.\n\n'+table(rows, ['set', 'threshold', 'recall', 'precision']))
    if r := load('privacy'): out.append('## Private data and secrets\n\n`bench/privacy.py`. '+r['method']+'\n\n'+table([dict(file=k, rows=f'{v["rows"]:,}', flagged=v['rows_flagged'], wrong=v['rows_wrong_by_hand'], **{'µs/row': v['us_per_row']}) for k,v in r['files'].items()], ['file', 'rows', 'flagged', 'wrong', 'µs/row']))
    (root/'measured.qmd').write_text('\n\n'.join(out)+'\n')

if __name__=='__main__': main()
