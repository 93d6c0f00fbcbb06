"""PUB: parameter update balancing."""

from __future__ import annotations

from .update_balancer import UpdateBalancer


class PUB(UpdateBalancer):
    """Parameter update balancing: weigh the *updates* the optimizer would make for each task.

    Source: PUB, arXiv 2410.05806, Algorithm 1 and Claim 1. One step:

        u_i = update_rule(g_i ; old moments)            for every task i
        a > 0 with  U^T U a = 1/a                       every `update_weights_every` steps
        theta <- (1 - lr weight_decay) theta - lr sum_i a_i u_i
        moments take one step of the rule on sum_i a_i g_i

    Where we deviate, or the paper is silent:

    - The bargaining problem is solved exactly; the paper's sequence of convex problems
      ("ccp") stops elsewhere on many Grams (`fastmto.solvers.bargaining`).
    - The exact solution fixes the joint step's length at sqrt(T) whatever the updates' lengths
      are, and training crawls; `scale` sets it on purpose.
    - Between searches one backward of sum_i a_i L_i and the plain rule on its gradient take the
      place of T backwards (the paper's timings are only reachable so).

    Task-specific parameters see only their own task: the plain optimizer with their own
    gradient, whatever the weights. Between searches that gradient is the weighted one divided by
    the task's weight, which rounds once.

    Param groups with other hyperparameters have buffers of their own; the Gram is summed over
    them, of updates without the learning rate. A parameter that its task does not reach in a
    step has a zero gradient (torch's optimizers would leave it out).

    Memory beside the model: the (T, P) gradients, the rule's moments and O(T^2). During
    `backward` autograd's own gradients of one task are there too, until they are copied.

    `torch.compile` takes the forward pass whole; its graphs end at `backward` and `step`, which
    walk the autograd graph and write to the parameters' memory.

    The shared parameters' `.grad` is a placeholder: it shows the joint gradient between two
    searches and one task's gradient in a search. A change of it cannot take effect, since updates
    are made of all tasks' gradients: `step` raises and names the argument to use. A head's `.grad`
    is its gradient, and may be changed.

    Layers may be frozen and brought back during training by `requires_grad_`: a frozen parameter
    and its moments are unchanged, the step count of its group goes on. `add_param_group` adds
    heads.

    Args:
        shared_parameters: what all tasks train: parameters of any floating dtype on one device,
            or dicts with "params" and own `lr`, `weight_decay` or rule hyperparameters. Their
            storage moves into flat buffers: build the optimizer after `model.to(...)`.
        task_parameters: one list per task (possibly empty), a dict of named lists, or one flat
            iterable, whose owners are found at the first search in which they have a gradient.
        lr: learning rate of all groups that bring none, >= 0.
        rule: "adam", "adagrad", "rmsprop" or a rule of `fastmto.rules` with its
            hyperparameters.
        weight_decay: decoupled decay a step, in units of lr, applied once.
        weighting: "bargaining" (exact), "ccp", the name of any method of the Gram matrix
            ("nashmtl", "cagrad", "upgrad", ...), a `fastmto.weightings.Weighting`, which may keep
            state, or any callable that takes a Gram (T, T) float64 on the CPU and returns weights
            (T,).
        update_weights_every: steps from search to search; the first step always searches.
        scale: length of the joint update: "mean_norm" (the mean length of the task updates),
            "rms" (sqrt(P): unit RMS a coordinate), "sum" (weights sum to T), "none" (as the
            weighting says).
        max_weight: upper bound of a single weight after scaling, None for none.
        between: what happens between searches: "weighted" (one backward, the default) or
            "per_task" (T backwards and the full combination; the default with `adatask`).
        clippy: bound every update as `fastmto.rules.Clippy` does; True for its defaults.
        adatask: every task keeps its own moments, (T, P) each (AdaTask, AAAI 2023).
        delayed: step with the weights of the search before, in the same pass that takes the new
            Gram; a search that fails (`on_failure="raise"`) does so after that step.
        clip_norm: largest norm of the joint gradient, as `torch.nn.utils.clip_grad_norm_` over
            all parameters takes it: if sum_i w_i g_i and the heads' gradients together are
            longer, all gradients are multiplied by clip_norm / norm before updates are formed of
            them. w are the weights before this step's search. See `optim/clipping.py`.
        clip_task_norm: largest norm of each task's gradient, its own heads included; before
            `clip_norm`. Needs between="per_task", which it makes the default.
        warmup_steps: learning rates are multiplied by min(1, t / warmup_steps) at step t = 1, 2,
            ...
        on_failure: a search that finds no weights (tasks Pareto stationary, or nearer to that than
            float32 tells, kappa above 1e7; a zero update) keeps the last ones ("hold") or raises
            `SolverError` ("raise").
        on_nonfinite: a NaN or infinite loss or gradient skips the step, parameters and state
            untouched ("skip"), or raises `NonFiniteError` ("raise"). Both policies count in
            `stats` and warn.
        capturable: whether what a step finds out stays on the device, so that no step synchronizes
            and steps can be captured in a CUDA graph (`fastmto.GraphedStep`). None: on GPUs, where
            it is possible: with the exact bargaining or another weighting that has a solver there,
            at most 64 tasks, no policy that raises, and no float16 parameters between="weighted".
            Then skipped steps and held weights do not warn (`stats` counts them), the steps from
            search to search count skipped ones too, and a step waits only until the first weights
            are found and it is known which task-specific parameters are whose.

    Attributes:
        weights: last task weights, (T,) float64 on the CPU; 1 before the first search, None
            while T is unknown.
        gram: Gram of the last search, over the tasks that took part.
        result: how the last solve ended (`fastmto.solvers.Result`), None where no solver was asked.
        stats: counts of steps, searches, backwards, searches that held the weights, searches
            that met max_weight, skipped steps, absent tasks and tasks that did not reach the
            shared parameters.
        capturable: as it was decided; None while T is unknown.

    Reading `weights`, `gram`, `result`, `stats` or a `state_dict` synchronizes with a GPU.

    Raises:
        ValueError: an argument is out of its range, a parameter is listed twice, complex, on
            another device, of a lazy module without a shape, or without dense memory.

    Example:
        >>> import torch, fastmto
        >>> trunk, heads = torch.nn.Linear(4, 8), [torch.nn.Linear(8, 1) for _ in range(2)]
        >>> optimizer = fastmto.PUB(trunk.parameters(), [head.parameters() for head in heads])
        >>> x = torch.randn(32, 4)
        >>> losses = [head(trunk(x)).pow(2).mean() for head in heads]
        >>> optimizer.zero_grad()
        >>> optimizer.backward(losses)
        >>> optimizer.step()
        >>> optimizer.weights.shape
        torch.Size([2])
    """
