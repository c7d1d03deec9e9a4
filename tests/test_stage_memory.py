"Lengths, cache, stages, offload and resident memory against real objects"
import os, random
import pytest

os.environ.setdefault('HF_HUB_OFFLINE', '1')
torch = pytest.importorskip('torch')
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from ftnb.base import UserError
from ftnb.fields import Recipe
from ftnb.kvcache import kv_cache
from ftnb.lengths import batch_lengths, batches, histogram, mean, packed_rows

# ---- lengths

def rows(seed, n=300):
    rng = random.Random(seed)
    return [min(512, max(3, int(rng.lognormvariate(4.2, .7)))) for _ in range(n)]

@pytest.mark.parametrize('seed', range(3))
@pytest.mark.parametrize('strategy', ['bfd', 'wrapped'])
def test_packing_makes_as_many_sequences_as_trl(seed, strategy):
    from datasets import Dataset
    from trl import pack_dataset
    lens = rows(seed)
    packed = pack_dataset(Dataset.from_dict(dict(input_ids=[[1]*n for n in lens])), 512, strategy)
    assert packed_rows(histogram(lens), 512, strategy)==len(packed)

@pytest.mark.parametrize('by_length', [False, True])
def test_padding_is_that_of_stage_3(by_length):
    from ftnb.train import padding_share
    lens = rows(7, 900)
    drawn = [padding_share(lens, 8, by_length, seed) for seed in range(1 if by_length else 40)]
    got = batches(Recipe(per_device_train_batch_size=8, max_length=512), lens, by_length)
    assert abs(got.padding-sum(drawn)/len(drawn))<.01 and got.longest==max(lens)

def test_the_order_is_chosen_as_stage_3_chooses_it():
    from ftnb.train import sampling
    for lens in (rows(1), [100]*50, [50]*40+[60]*40):
        r = Recipe(per_device_train_batch_size=8, max_length=512)
        assert abs(batches(r, lens).padding-sampling(r, lens)[1])<.02

def test_shares_of_batches_sum_to_one():
    for b in (1, 3, 8, 1000): assert abs(sum(batch_lengths(histogram(rows(2)), b).values())-1)<1e-9
    assert abs(mean(batch_lengths(histogram(rows(2)), 1))-sum(rows(2))/300)<1e-6

# ---- the cache

tiny = dict(hidden_size=64, num_hidden_layers=7, num_attention_heads=4, vocab_size=160, intermediate_size=104, pad_token_id=0, max_position_embeddings=256)
families = dict(llama=dict(num_key_value_heads=2), mistral=dict(num_key_value_heads=2, sliding_window=16), qwen2=dict(num_key_value_heads=2, use_sliding_window=True, sliding_window=16, max_window_layers=3), qwen3=dict(num_key_value_heads=2, head_dim=24),
    gemma2=dict(num_key_value_heads=2, head_dim=24, sliding_window=16), gemma3_text=dict(num_key_value_heads=1, head_dim=24, sliding_window=16), phi=dict(), phi3=dict(num_key_value_heads=2, sliding_window=16),
    mixtral=dict(num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2), falcon=dict(multi_query=True), falcon_new=dict(new_decoder_architecture=True, num_kv_heads=2))

@pytest.mark.parametrize('name', families)
def test_the_cache_is_that_of_transformers_to_the_byte(name):
    config = dict(tiny, model_type=name.removesuffix('_new'), **families[name])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.bfloat16, attn_implementation='eager' if name=='gemma2' else 'sdpa').eval()
    cache = DynamicCache(config=model.config)
    def held(): return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for l in cache.layers for t in (l.keys, l.values)}.values())
    def counted(): return sum(t.numel()*t.element_size() for l in cache.layers for t in (l.keys, l.values))
    with torch.no_grad():
        model(torch.ones(3, 30, dtype=torch.long), past_key_values=cache, use_cache=True)
        assert (counted(), held())==((c := kv_cache(config, 3, 30)).total, c.prompt)
        for i in range(5): model(torch.ones(3, 1, dtype=torch.long), past_key_values=cache, use_cache=True)
        assert counted()==kv_cache(config, 3, 35).total
