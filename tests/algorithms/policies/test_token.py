"""Ways of decoding tokens: their densities are enumerated, at three tokens of a vocabulary of three."""

import itertools
import math

import pytest
import torch

from algorithms.policies.base import ADVANTAGE, Chunk
from algorithms.policies.registry import build
from algorithms.policies.token_decoding import counts, pick
from fleet.errors import PolicyError
from fleet.spec import STATE

V, H, E = 3, 3, 4
DECODINGS = ("autoregressive", "parallel", "diffusion")
TINY = {"reads": {STATE: [2]}, "action_dim": 1, "horizon": H, "instruction_dim": 0, "num_bins": V, "num_rounds": 3}
SIZES = {"width": 16, "num_heads": 2, "encoder_layers": 1, "num_layers": 1}


def _policy(decoding="parallel", seed=0, move=0.4, **changes):
    """Its weights are moved so far that its distributions are not flat."""
    torch.manual_seed(seed)
    policy = build("token", {**TINY, **SIZES, "decoding": decoding, **changes})
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(move * torch.randn_like(parameter))
    return policy.eval()


def _obs(batch=1):
    return {STATE: torch.tensor([[0.3, -0.8]]).expand(batch, 2)}


def _records(policy):
    """All records that this policy's act can end with, by what is drawn: for one observation, (N, *shape)."""
    name, shape = next(iter(policy.spec.replay.items()))
    if len(shape) == 1:
        return torch.tensor(list(itertools.product(range(V), repeat=shape[0])))
    found, rows = {}, 4000
    for seed in range(3):
        noise = policy.noise(rows, torch.Generator().manual_seed(seed))
        found |= {tuple(r.flatten().tolist()): r for r in policy.act(_obs(rows), noise).replay[name]}
    return torch.stack(list(found.values()))


def _log_prob(policy, records):
    name = next(iter(policy.spec.replay))
    return policy.log_prob(_obs(len(records)), Chunk(torch.zeros(len(records), H, 1), None, {name: records}))


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("decoding", DECODINGS)
def test_densities_sum_to_one_and_act_draws_by_them(decoding, temperature, scale):
    policy = _policy(decoding, temperature=temperature, remask=0.9)
    records = _records(policy)
    with torch.no_grad():
        probability = _log_prob(policy, records).sum(1).exp()
    torch.testing.assert_close(probability.sum(), torch.tensor(1.0), rtol=0, atol=2e-3 if decoding == "diffusion" else 1e-5)
    assert probability.max() > 2 / len(records)  # far from flat
    rows = 8_000 * scale
    with torch.no_grad():
        chunk = policy.act(_obs(rows), policy.noise(rows, torch.Generator().manual_seed(9)))
    drawn = next(iter(chunk.replay.values())).flatten(1)
    share = torch.stack([(drawn == record.flatten()).all(1).float().mean() for record in records])
    error = (probability * (1 - probability) / rows).sqrt()
    assert ((share - probability).abs() <= 4.5 * error + 1e-4).all()


@pytest.mark.parametrize("decoding", DECODINGS)
def test_the_mean_ratio_of_other_weights_is_one(decoding, scale):
    rows, policy, other = 8_000 * scale, _policy(decoding, remask=0.9), _policy(decoding, remask=0.9)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
        chunk = policy.act(_obs(rows), policy.noise(rows, torch.Generator().manual_seed(1)))
        log_ratio_BT = other.log_prob(_obs(rows), chunk) - chunk.log_prob_BT
    for executed in ([1, 1, 1], [1, 0, 0], [0, 1, 0]):
        mask_BT = policy.decision_mask(chunk, torch.tensor([executed]).expand(rows, H))
        ratio = (log_ratio_BT * mask_BT).sum(1).exp()
        assert ratio.std() > 0.05
        assert abs(ratio.mean() - 1) < 4.5 * ratio.std() / rows**0.5


def test_any_recorded_order_of_diffusion_has_a_density():
    """Also an order that these weights would not have taken: by round, places that are drawn, then places masked again."""
    policy = _policy("diffusion")
    order = [([2], []), ([0], [2]), ([1, 2], [])]
    records = []
    for values in itertools.product(range(V), repeat=4):
        tokens, left, chain = torch.full((H,), V), iter(values), []
        for drawn, masked in order:
            for place in drawn:
                tokens[place] = next(left)
            tokens[masked] = V
            chain.append(tokens.clone())
        records.append(torch.stack(chain))
    # What place 2 held after the first round is in the record, so all V ** 4 are told apart.
    log_prob_BT = _log_prob(policy, torch.stack(records))
    torch.testing.assert_close(log_prob_BT.sum(1).exp().sum(), torch.tensor(1.0), rtol=0, atol=1e-5)


@pytest.mark.parametrize("decoding", DECODINGS)
def test_gradients_of_log_prob_are_its_differences(decoding):
    policy, step = _policy(decoding).double(), 1e-3
    obs = {STATE: _obs()[STATE].double()}
    chunk = policy.act(obs, policy.noise(1, torch.Generator().manual_seed(0)))
    policy.log_prob(obs, chunk).sum().backward()
    for seed in range(4):
        g = torch.Generator().manual_seed(seed)
        ways = {name: torch.randn(p.shape, generator=g, dtype=p.dtype) for name, p in policy.named_parameters()}
        slope = sum((p.grad * ways[name]).sum() for name, p in policy.named_parameters() if p.grad is not None)
        ends = []
        with torch.no_grad():
            for factor in (1, -2):
                for name, parameter in policy.named_parameters():
                    parameter.add_(factor * step * ways[name])
                ends.append(policy.log_prob(obs, chunk).double().sum())
            for name, parameter in policy.named_parameters():
                parameter.add_(step * ways[name])
        difference = (ends[0] - ends[1]) / (2 * step)
        assert abs(slope) > 0.05
        torch.testing.assert_close(slope, difference, rtol=2e-3, atol=2e-3)


def test_a_causal_head_sees_earlier_tokens_only_and_steps_say_the_same():
    policy = _policy("autoregressive", horizon=6, num_bins=7)
    predict = policy._predictor(_obs())
    tokens = torch.randint(7, (1, 6), generator=torch.Generator().manual_seed(0))
    logits, cache, before = predict(tokens), [], predict.nothing()[:, 0]
    for t in range(6):
        changed = tokens.clone()
        changed[0, t] = (changed[0, t] + 1) % 7
        moved = (predict(changed) - logits).abs().amax(-1)[0]
        assert (moved[: t + 1] == 0).all() and (moved[t + 1 :] > 1e-4).all()
        torch.testing.assert_close(predict.step(before, t, cache), logits[:, t], rtol=1e-4, atol=1e-4)
        before = tokens[:, t]
    assert cache[0][0].shape[2] == 6


@pytest.mark.parametrize("decoding", ["parallel", "diffusion"])
def test_other_heads_see_all_that_is_known(decoding):
    policy = _policy(decoding, action_dim=2)
    predict = policy._predictor(_obs())
    nothing = predict.nothing()
    logits = [predict(nothing)]
    for place, token in itertools.product(range(2 * H), range(V)):  # which dimension it is matters too
        known = nothing.clone()
        known[0, place] = token
        logits.append(predict(known))
        assert ((logits[-1] - logits[0]).abs().amax(-1) > 1e-4).all()
    different = (torch.stack(logits)[:, None] - torch.stack(logits)).flatten(2).abs().amax(-1)
    assert (different + torch.eye(len(logits)) > 1e-3).all()


def test_without_noise_the_likeliest_token_follows_the_likeliest():
    policy = _policy("autoregressive", horizon=6, num_bins=7)
    chunk = policy.act(_obs(2))
    tokens = chunk.replay["replay.tokens"].long()
    predicted = policy._predictor(_obs(2))(tokens)
    assert torch.equal(predicted.argmax(-1), tokens) and chunk.log_prob_BT is None
    assert torch.equal(chunk.actions_BHA, policy.scale.restore(policy.codec.decode(tokens)))


@pytest.mark.parametrize("num_tokens", [1, 3, 12, 112])
@pytest.mark.parametrize("num_rounds", [1, 2, 5, 16])
@pytest.mark.parametrize("remask", [0.0, 0.3, 0.99])
def test_the_last_round_knows_all(num_tokens, num_rounds, remask):
    known = 0
    for r, (num_drawn, num_masked) in enumerate(counts(num_tokens, num_rounds, remask)):
        assert 0 <= num_masked <= known and 0 <= num_drawn <= num_tokens - known
        known += num_drawn
        share = 1 - math.cos(math.pi / 2 * (r + 1) / num_rounds)
        assert share * num_tokens - 1e-6 <= known < share * num_tokens + 1
        known -= num_masked
    assert known == num_tokens


@pytest.mark.parametrize("noisy", [False, True])
def test_masking_again_changes_tokens_and_leaves_none_unknown(noisy):
    policy = _policy("diffusion", horizon=16, num_bins=9, num_rounds=6, remask=0.5)
    noise = policy.noise(8, torch.Generator().manual_seed(0)) if noisy else None
    obs = {STATE: torch.randn(8, 2, generator=torch.Generator().manual_seed(1))}
    chain = policy.act(obs, noise).replay["replay.chain"]
    known = chain < 9
    assert known[:, -1].all() and torch.equal(known.sum(2), known.sum(2)[:1].expand(8, -1))
    expected = [sum(d - m for d, m in counts(16, 6, 0.5)[: r + 1]) for r in range(6)]
    assert known[0].sum(1).tolist() == expected
    first = torch.where(known, chain, 0).gather(1, known.int().argmax(1, keepdim=True))[:, 0]
    assert (first != chain[:, -1]).any()  # some place holds another token at last than at first
    # The surest places come first, by what is known before anything is.
    sure = policy._predictor(obs)(torch.full((8, 16), 9)).log_softmax(-1).amax(-1)
    assert torch.equal(known[:, 0].float().argmax(1), sure.argmax(1))


@pytest.mark.parametrize("decoding", DECODINGS)
def test_the_loss_is_the_mean_of_minus_log_prob(decoding):
    """Where all is predicted at once: always, or of diffusion in a single round, or without noise."""
    policy = _policy(decoding, horizon=4, action_dim=2, num_rounds=1)
    actions, mask = torch.rand(3, 4, 2) * 2 - 1, torch.ones(3, 4)
    mask[1, 1:] = 0
    name, shape = next(iter(policy.spec.replay.items()))
    tokens = policy.codec.encode(torch.where(mask[..., None] > 0, actions, actions[:, :1]))
    log_prob = policy.log_prob(_obs(3), Chunk(actions, None, {name: tokens.reshape(3, *shape)}))
    chosen = policy.decision_mask(Chunk(actions), mask)
    assert chosen.sum(1).tolist() == [8, 2, 8]
    expected = -(log_prob * chosen).sum(1) / chosen.sum(1)
    torch.testing.assert_close(policy.imitation_loss(_obs(3), Chunk(actions), mask), expected)


def test_diffusion_learns_masked_tokens_from_the_others():
    policy, actions, mask = _policy("diffusion", horizon=6), torch.rand(1, 6, 1) * 2 - 1, torch.ones(1, 6)
    mask[0, 5:] = 0
    tokens = policy.codec.encode(actions)[0]
    for u, num_masked in ((0.0, 5), (0.5, 4), (0.7, 3), (0.999999, 1)):
        order = torch.tensor([0.9, 0.1, 0.5, 0.3, 0.7, 0.0])  # the sixth is not valid: masked, and not learnt
        noise = {"mask": torch.cat([torch.tensor([u]), order])[None]}
        masked = [1, 3, 2, 4, 0][:num_masked]
        inputs = tokens.clone()
        inputs[[*masked, 5]] = V
        logits = policy._predictor(_obs())(inputs[None])[0]
        expected = torch.nn.functional.cross_entropy(logits[masked], tokens[masked])
        torch.testing.assert_close(policy.imitation_loss(_obs(), Chunk(actions), mask, noise)[0], expected)


def test_blur_is_least_at_the_blurred_target_and_none_is_plain():
    policy = _policy(horizon=1, num_bins=21, blur=1.5)
    policy.head.out.weight.data.zero_()
    target, mask = torch.tensor([[[0.3]]]), torch.ones(1, 1)
    bell = -0.5 * ((torch.arange(21) - 13) / 1.5) ** 2
    losses = []
    for logits in (bell, torch.zeros(21), bell.roll(1)):
        policy.head.out.bias.data.copy_(logits)
        losses.append(policy.imitation_loss(_obs(), Chunk(target), mask).item())
    entropy = torch.distributions.Categorical(logits=bell).entropy().item()
    assert losses[0] == pytest.approx(entropy, abs=1e-5) and losses[1] == pytest.approx(math.log(21), abs=1e-5)
    assert losses[2] > losses[0]


def test_soft_decode_is_the_expected_action():
    policy = _policy(soft_decode=True, num_bins=9)
    name = "replay.tokens"
    chance = policy._predictor(_obs())(torch.full((1, H), 9)).softmax(-1)
    expected = (chance * torch.linspace(-1, 1, 9)).sum(-1)[..., None]
    torch.testing.assert_close(policy.act(_obs()).actions_BHA, policy.scale.restore(expected))
    noise = policy.noise(1, torch.Generator().manual_seed(0))
    chunk = policy.act(_obs(), noise)
    assert torch.equal(chunk.actions_BHA, policy.scale.restore(policy.codec.decode(chunk.replay[name])))
    rounded = policy.codec.encode(expected)  # what is recorded of an expectation: the tokens next to it
    assert torch.equal(policy.act(_obs()).replay[name], rounded.int())


@pytest.mark.parametrize("decoding", DECODINGS)
def test_guidance_blends_logits_with_and_without_the_advantage(decoding):
    policy, noise_seed = _policy(decoding, advantage=True, num_bins=9), 0
    good = {**_obs(4), ADVANTAGE: torch.ones(4)}
    bad, absent = {**_obs(4), ADVANTAGE: -torch.ones(4)}, {**_obs(4), ADVANTAGE: torch.zeros(4)}
    inputs = torch.full((4, H), 9)
    with torch.no_grad():
        of_good, of_bad, of_none = (policy._predictor(obs)(inputs) for obs in (good, bad, absent))
        for one, two in itertools.combinations((of_good, of_bad, of_none), 2):
            assert (one - two).abs().max() > 1e-2
        torch.testing.assert_close(policy._predictor(_obs(4))(inputs), of_none)
        blended = policy._predictor(good, 3.0)(inputs)
        torch.testing.assert_close(blended, of_none + 3 * (of_good - of_none), rtol=1e-4, atol=1e-4)
        noise = policy.noise(4, torch.Generator().manual_seed(noise_seed))
        name = next(iter(policy.spec.replay))
        plain, left_out, guided = (policy.act(good, noise, guidance) for guidance in (1.0, 0.0, 3.0))
        unconditional = policy.act(absent, noise)
        assert torch.equal(left_out.replay[name], unconditional.replay[name])
        assert torch.equal(left_out.log_prob_BT, unconditional.log_prob_BT)
        assert guided.log_prob_BT is None and plain.log_prob_BT is not None
        assert torch.equal(policy.act(absent, noise, 3.0).replay[name], unconditional.replay[name])


def test_cached_steps_are_guided_too():
    policy = _policy("autoregressive", advantage=True, horizon=5, num_bins=9)
    predict = policy._predictor({**_obs(), ADVANTAGE: torch.ones(1)}, 2.5)
    tokens = policy.act({**_obs(), ADVANTAGE: torch.ones(1)}, guidance=2.5).replay["replay.tokens"].long()
    assert torch.equal(predict(tokens).argmax(-1), tokens)


def test_tokens_are_where_the_cumulative_probability_passes_the_number():
    logits = torch.tensor([0.2, 0.0, 0.5, 0.3]).log()
    uniform = torch.tensor([0.0, 0.19, 0.21, 0.69, 0.71, 1 - 2**-24])
    assert pick(logits.expand(6, 4), uniform).tolist() == [0, 0, 2, 2, 3, 3]
    assert pick(torch.tensor([-torch.inf, 0.0]), torch.tensor(0.0)) == 1  # what has no probability is not drawn
    assert pick(logits, None) == 2


def test_actions_beyond_the_range_are_learnt_as_its_end_and_what_is_not_finite_is_no_token():
    policy, mask = _policy(), torch.ones(1, H)
    end, beyond = torch.ones(1, H, 1), torch.full((1, H, 1), 1e6)
    loss = policy.imitation_loss(_obs(), Chunk(end), mask)
    torch.testing.assert_close(policy.imitation_loss(_obs(), Chunk(beyond), mask), loss)
    for value in (torch.nan, torch.inf):
        broken = end.clone()
        broken[0, 1] = value
        assert not policy.imitation_loss(_obs(), Chunk(broken), mask).isfinite()
        assert policy.imitation_loss(_obs(), Chunk(broken), torch.tensor([[1.0, 0, 1]])).isfinite()


@pytest.mark.parametrize("decoding", DECODINGS)
@pytest.mark.parametrize("where", ["head.out.bias", "head.place_PF", "encoder.norm.weight"])
def test_logits_that_are_not_finite_do_not_act_unseen(decoding, where):
    policy = _policy(decoding=decoding)
    with torch.no_grad():
        policy.get_parameter(where)[0] = torch.nan
    for noise in (None, policy.noise(1, torch.Generator().manual_seed(0))):
        assert policy.act(_obs(), noise).actions_BHA.isnan().all()


def test_what_is_said_later_fits_what_was_said_before():
    """Half of the chunks go left, half right. Tokens that are drawn independently mix both within a chunk."""
    side = torch.where(torch.arange(16) % 2 == 0, 1.0, -1.0)
    mixed = {}
    for decoding in DECODINGS:
        policy = _policy(decoding, move=0.0)
        optimizer = torch.optim.Adam(policy.parameters(), 5e-3)
        for step in range(120):
            noise = policy.noise(16, torch.Generator().manual_seed(step))
            chunk, mask = Chunk(side[:, None, None].expand(16, H, 1)), torch.ones(16, H)
            optimizer.zero_grad()
            policy.imitation_loss(_obs(16), chunk, mask, noise).mean().backward()
            optimizer.step()
        drawn = policy.act(_obs(400), policy.noise(400, torch.Generator().manual_seed(0))).actions_BHA[..., 0]
        assert 0.35 < (drawn[:, 0] > 0).float().mean() < 0.65
        mixed[decoding] = (drawn != drawn[:, :1]).any(1).float().mean().item()
    assert mixed["autoregressive"] < 0.05 and mixed["diffusion"] < 0.4 and mixed["parallel"] > 0.6


@pytest.mark.parametrize(
    ("replay", "said"),
    [
        ({}, "is missing"),
        ({"replay.tokens": torch.zeros(1, H + 1)}, "has shape"),
        ({"replay.tokens": torch.full((1, H), V)}, "holds 3 to 3"),
        ({"replay.tokens": torch.full((1, H), torch.nan)}, "tokens of this policy are 0 to 2"),
    ],
)
def test_records_that_are_not_its_own_are_refused(replay, said):
    with pytest.raises(PolicyError) as caught:
        _policy().log_prob(_obs(), Chunk(torch.zeros(1, H, 1), None, replay))
    assert said in str(caught.value) and "replay.tokens" in str(caught.value)


def test_a_record_may_come_flat_and_as_floats():
    policy = _policy("diffusion")
    chunk = policy.act(_obs(5), policy.noise(5, torch.Generator().manual_seed(0)))
    flat = {name: column.float().flatten(1) for name, column in chunk.replay.items()}
    assert torch.equal(policy.log_prob(_obs(5), Chunk(chunk.actions_BHA, None, flat)), chunk.log_prob_BT)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"decoding": "serial"}, "autoregressive, parallel, diffusion"),
        ({"codec": "fast"}, "bins, dct"),
        ({"num_bins": 1}, "num_bins is 2 to"),
        ({"num_frequencies": H + 1}, "num_frequencies is 0 to horizon"),
        ({"remask": 1.0}, "remask is in [0, 1)"),
        ({"temperature": 0.0}, "temperature is above 0"),
        ({"num_heads": 3}, "width divides by num_heads"),
        ({"decoding": "diffusion", "soft_decode": True}, "soft_decode is for decoding = parallel"),
        ({"reads": {}}, "reads is not empty"),
        ({"horizon": 0}, "horizon is at least 1"),
    ],
)
def test_refusals(changes, said):
    with pytest.raises(PolicyError) as caught:
        build("token", {**TINY, **SIZES, **changes})
    assert said in str(caught.value)
