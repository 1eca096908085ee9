import numpy as np
import torch

from algorithms.td import chunk_return, prefix_return
from tests.batches import make_batch, take_rows

H, GAMMA = 3, 0.9
LENGTHS = tuple(range(1, H + 1))


def windows_of(num_steps, rewards, *, terminated=False, starts=None):
    """All windows of an episode of ``num_steps`` steps whose observation is the step's number, as the sampler makes them."""
    t_B = np.arange(num_steps) if starts is None else np.asarray(starts)
    place_BH = t_B[:, None] + np.arange(H)
    mask_BH = place_BH < num_steps
    step_BH = np.minimum(place_BH, num_steps - 1)
    ended_BH = mask_BH & (step_BH == num_steps - 1) & terminated
    number = {k: torch.from_numpy(np.minimum(t_B + k, num_steps - 1)).float()[:, None] for k in (0, *LENGTHS)}
    return make_batch(
        {"state": number[0]},
        torch.zeros(len(t_B), H, 1),
        mask_BH=torch.from_numpy(mask_BH),
        rewards_BH=torch.from_numpy(np.where(mask_BH, np.asarray(rewards, np.float32)[step_BH], 0)),
        terminated_BH=torch.from_numpy(ended_BH),
        obs_at={k: {"state": number[k]} for k in LENGTHS},
        inside_at={k: torch.from_numpy(t_B + k < num_steps) for k in LENGTHS},
    )


def target(batch, value_of, discount=GAMMA):
    reward_B, bootstrap_B, weight_B = chunk_return(batch, batch.rewards_BH, discount)
    return reward_B + bootstrap_B * value_of(batch.obs_at[H]["state"][:, 0]), weight_B


def test_the_target_of_q_chunking_in_numbers():
    batch = windows_of(9, [0, 1, 2, 0, 0, 0, 0, 0, 0], starts=[0])
    torch.testing.assert_close(target(batch, lambda state: 5.0)[0], torch.tensor([6.165]))


def test_a_terminal_chunk_is_padded_and_masked_not_dropped():
    batch = windows_of(5, [0, 0, 0, 0, 1], terminated=True)
    reward_B, bootstrap_B, weight_B = chunk_return(batch, batch.rewards_BH, GAMMA)
    torch.testing.assert_close(reward_B, torch.tensor([0, 0, GAMMA**2, GAMMA, 1]))
    torch.testing.assert_close(bootstrap_B, torch.tensor([GAMMA**3, GAMMA**3, 0, 0, 0]))
    assert (weight_B == 1).all()


def test_a_time_limit_is_bootstrapped_from_the_last_observation_that_is_known():
    rewards = [1.0, 2.0, 4.0, 8.0, 16.0]
    batch = windows_of(5, rewards)  # steps 0 to 4; nobody recorded what came after step 4
    reward_B, bootstrap_B, weight_B = chunk_return(batch, batch.rewards_BH, GAMMA)
    expected = [
        1 + 2 * GAMMA + 4 * GAMMA**2,  # bootstraps at step 3
        2 + 4 * GAMMA + 8 * GAMMA**2,  # at step 4
        4 + 8 * GAMMA,  # stops one step early: at step 4
        8,
        0,
    ]
    torch.testing.assert_close(reward_B, torch.tensor(expected))
    torch.testing.assert_close(bootstrap_B, torch.tensor([GAMMA**3, GAMMA**3, GAMMA**2, GAMMA, 0]))
    assert weight_B.tolist() == [1, 1, 1, 1, 0]
    observed = batch.obs_at[H]["state"][:, 0]
    assert observed.tolist() == [3, 4, 4, 4, 4]


def test_what_is_terminal_may_be_said_by_somebody_else():
    batch = windows_of(5, [0, 0, 0, 0, 1])
    said = torch.zeros_like(batch.terminated_BH)
    said[2, 2] = said[0, 1] = True  # a success in the last step, and one in the midst of a window
    reward_B, bootstrap_B, _ = chunk_return(batch, torch.ones(5, H), GAMMA, said)
    torch.testing.assert_close(reward_B[[0, 2]], torch.tensor([1 + GAMMA, 1 + GAMMA + GAMMA**2]))
    torch.testing.assert_close(bootstrap_B[:3], torch.tensor([0, GAMMA**3, 0]))


def test_garbage_in_masked_steps_changes_nothing():
    for terminated in (False, True):
        batch = windows_of(5, [1, 2, 3, 4, 5], terminated=terminated)
        clean = prefix_return(batch, batch.rewards_BH, GAMMA, LENGTHS)
        batch.rewards_BH = torch.where(batch.mask_BH, batch.rewards_BH, float("nan"))
        batch.terminated_BH = batch.terminated_BH | ~batch.mask_BH
        for one, other in zip(clean, prefix_return(batch, batch.rewards_BH, GAMMA, LENGTHS), strict=True):
            assert torch.equal(one, other)


def test_the_first_prefix_is_one_step_td_and_the_last_one_the_chunk():
    for terminated in (False, True):
        batch = windows_of(6, [1, 2, 3, 4, 5, 6], terminated=terminated)
        reward_BL, bootstrap_BL, weight_BL = prefix_return(batch, batch.rewards_BH, GAMMA, LENGTHS)
        last = torch.tensor(6.0 if terminated else 0.0)
        torch.testing.assert_close(reward_BL[:, 0], torch.cat([torch.arange(1.0, 6.0), last[None]]))
        torch.testing.assert_close(bootstrap_BL[:, 0], torch.tensor([GAMMA] * 5 + [0.0]))
        assert weight_BL[:, 0].tolist() == [1] * 5 + [float(terminated)]
        whole = chunk_return(batch, batch.rewards_BH, GAMMA)
        for prefix, chunk in zip((reward_BL, bootstrap_BL, weight_BL), whole, strict=True):
            assert torch.equal(prefix[:, -1], chunk)
        some = take_rows(batch, [5, 1])
        assert torch.equal(chunk_return(some, some.rewards_BH, GAMMA)[0], whole[0][[5, 1]])


def walk(actions, num_states):
    """Windows of a walk on a chain: action 1 goes right, 0 stays; right of the last state is the goal, where it ends."""
    places, rewards = [0], []
    for action in actions:
        rewards.append(-0.1 + (places[-1] + action == num_states))
        places.append(places[-1] + action)
    reached = places[-1] == num_states
    assert max(places[:-1]) < num_states
    batch = windows_of(len(actions), rewards, terminated=reached)
    for obs in (batch.obs, *batch.obs_at.values()):
        obs["state"] = torch.tensor(places, dtype=torch.long)[obs["state"].long()]
    step_BH = torch.clamp(torch.arange(len(actions))[:, None] + torch.arange(H), max=len(actions) - 1)
    batch.actions_BHA = torch.tensor(actions)[step_BH][..., None]
    return batch


def exact_values(num_states):
    """Q of each chunk of three actions in each state of that chain, by dynamic programming."""
    q = np.zeros((num_states, 2, 2, 2))
    for _ in range(200):
        for start, *chunk in np.ndindex(num_states, 2, 2, 2):
            place, total = start, 0.0
            for i, action in enumerate(chunk):
                total += GAMMA**i * (-0.1 + (place + action == num_states))
                place += action
                if place == num_states:
                    break
            else:
                total += GAMMA**H * q[place].max()
            q[(start, *chunk)] = total
    return torch.from_numpy(q).float()


def test_chunk_values_of_a_chain_are_those_of_dynamic_programming():
    """Also with terminals at each place of a chunk, and when most of the best walks were cut by a time limit."""
    num_states, rng = 5, np.random.default_rng(0)
    walks, best = [], [1] * num_states
    for _ in range(60):
        actions, place = [], 0
        while place < num_states:
            actions.append(int(rng.integers(2)))
            place += actions[-1]
        walks.append(walk(actions, num_states))
    walks += [walk(best[:length], num_states) for length in (1, 2, 3, 4) for _ in range(20)]
    fields = [(b.obs["state"][:, 0], b.actions_BHA[..., 0], b.obs_at[H]["state"][:, 0]) for b in walks]
    at_B, chunk_BH, next_B = (torch.cat(parts) for parts in zip(*fields, strict=True))
    at = (at_B, *chunk_BH.T)
    reward_B, bootstrap_B, weight_B = (
        torch.cat(parts) for parts in zip(*(chunk_return(b, b.rewards_BH, GAMMA) for b in walks), strict=True)
    )
    learnt, seen = torch.zeros(num_states, 2, 2, 2), torch.zeros(num_states, 2, 2, 2)
    seen.index_put_(at, weight_B, accumulate=True)
    for _ in range(40):
        best_B = learnt.flatten(1).amax(1)[next_B]
        total = torch.zeros_like(seen).index_put_(at, weight_B * (reward_B + bootstrap_B * best_B), accumulate=True)
        learnt = torch.where(seen > 0, total / seen.clamp(min=1), -9.0)
    assert (seen > 0).float().mean() > 0.7
    torch.testing.assert_close(learnt[seen > 0], exact_values(num_states)[seen > 0], rtol=1e-5, atol=1e-5)
