"""Judge the rollouts of verl, OpenRLHF, SkyRL, prime-rl and AReaL; docs/rollouts.md says where each function belongs.

These functions were written from the sources of the five loops, and were not run in them.
"""

import json

import torch

from loraover_serve import RolloutJudge, scale_faults

judge = RolloutJudge(window=8)
faults = scale_faults(2.0)  # the adapter's alpha / r


def write_step(file, step, e, a, b, prompt_ids, rows, positions):
    """Write the arrays of a step for `loraover judge-rollouts`."""
    for values in zip(prompt_ids, rows, positions, e, a, b, strict=True):
        row = dict(zip(("prompt_id", "row", "position", "e", "a", "b"), values, strict=True))
        file.write(json.dumps({"step": step, **row}) + "\n")


def flat(mask, *arrays):
    """Rows, positions and values of the tokens that a mask of shape (rows, tokens) keeps."""
    rows, positions = mask.bool().nonzero(as_tuple=True)
    return rows.tolist(), positions.tolist(), *(array[mask.bool()].tolist() for array in arrays)


def judge_verl(batch):
    """Judge a batch of verl."""
    tensors = batch.batch
    arrays = (tensors[name] for name in ("rollout_log_probs", "old_log_probs", "ref_log_prob"))
    rows, positions, e, a, b = flat(tensors["response_mask"], *arrays)
    prompt_ids = [batch.non_tensor_batch["uid"][row] for row in rows]
    return judge.step(e, a, b, prompt_ids, rows=rows, positions=positions, faults=faults)


def judge_openrlhf(samples_list):
    """Judge the samples of OpenRLHF."""
    found = [[], [], [], [], [], []]
    for number, s in enumerate(samples_list):
        rows, *values = flat(s.action_mask, s.rollout_log_probs, s.action_log_probs, s.base_action_log_probs)
        prompts, names = [s.prompts[row] for row in rows], [f"{number}/{row}" for row in rows]
        for kept, more in zip(found, (names, *values, prompts), strict=True):
            kept.extend(more)
    names, positions, e, a, b, prompts = found
    return judge.step(e, a, b, prompts, rows=names, positions=positions, faults=faults)


def judge_skyrl(training_input):
    """Judge a training input of SkyRL."""
    names = ("rollout_logprobs", "action_log_probs", "base_action_log_probs")
    rows, positions, e, a, b = flat(training_input["loss_mask"] > 0, *(training_input[name] for name in names))
    prompt_ids = [training_input.metadata["uids"][row] for row in rows]
    return judge.step(e, a, b, prompt_ids, rows=rows, positions=positions, faults=faults)


def rows_of_prime_rl(line, row, base_logprobs):
    """Yield the rows that `loraover judge-rollouts` reads, of a line that prime-rl exports."""
    prompt = " ".join(map(str, line["token_ids"][: line["loss_mask"].index(True)]))
    for position, trained in enumerate(line["loss_mask"]):
        if trained:
            e, a = line["inference_logprobs"][position], line["trainer_logprobs"][position]
            place = {"step": line["step"], "prompt_id": prompt, "row": row, "position": position}
            yield place | {"e": e, "a": a, "b": base_logprobs[position]}


def judge_areal(rollout_batch):
    """Judge a batch of AReaL."""
    found = []
    for number, each in enumerate(rollout_batch):
        mask, e = (torch.roll(each[name], shifts=-1, dims=-1) for name in ("loss_mask", "logprobs"))
        starts = each["loss_mask"].argmax(-1).tolist()
        prompts = [tuple(ids[:start]) for ids, start in zip(each["input_ids"].tolist(), starts, strict=True)]
        for row, *values in zip(*flat(mask, e, each["prox_logp"], each["ref_logp"]), strict=True):
            found.append((prompts[row], (number, row), *values))
    prompt_ids, rows, positions, e, a, b = zip(*found, strict=True)
    return judge.step(e, a, b, prompt_ids, rows=rows, positions=positions, faults=faults)
