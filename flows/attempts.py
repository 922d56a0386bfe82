"""Calling a step from a flow: what is tried again, and what Prefect is told when it fails."""

import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.tasks import Task

from medseg.files import UserError
from medseg.result import Result
from medseg.tracking.failure import describe_failure, scrub

GPU_TAG = "medseg-gpu"
"""Tag of tasks that train or predict; a concurrency limit on it, where a site sets one, shares out its GPUs."""
RETRY_DELAYS_S = [10.0, 60.0]


class StepError(RuntimeError):
    """A step failed for a reason that is not the user's; the cause without paths.

    Attributes:
        transient: a disk, a network or a server failed, which may have passed a minute later.
    """

    transient = False


def call_step(
    name: str, workspace: Path, step: Callable[[], Result], *, restartable: bool = False, gpu: bool = False
) -> Result:
    """Run one step as a task of the current flow run.

    Args:
        name: of the task.
        workspace: paths below it may be told to Prefect, no others.
        step: may be called again after a failure when `restartable`; it then goes on where it stopped.
        restartable: try again, twice, when a disk, a network or a server failed.
        gpu: count it against the concurrency limit of `GPU_TAG`, if there is one.

    Raises:
        UserError: bad usage or input; the sentence without paths outside the workspace.
        StepError: anything else.
    """
    tried = _attempt.with_options(
        name=name,
        tags=[GPU_TAG] if gpu else [],
        retries=len(RETRY_DELAYS_S) if restartable else 0,
        retry_delay_seconds=RETRY_DELAYS_S if restartable else 0,
        retry_condition_fn=_is_worth_retrying,
    )
    return tried(step, workspace)


@task(cache_policy=NO_CACHE, persist_result=False, result_serializer="json", log_prints=False)
def _attempt(step: Callable[[], Result], workspace: Path) -> Result:
    """Call the step. Messages of exceptions carry paths, and paths names of patients: the whole goes to stderr only."""
    try:
        return step()
    except UserError as error:
        print(f"Error: {error}", file=sys.stderr)
        raise UserError(scrub(str(error), workspace)) from None
    except Exception as error:
        traceback.print_exc()
        failure = describe_failure(error, workspace)
        get_run_logger().error(failure.details)
        told = StepError(failure.cause)
        told.transient = _is_transient(error)
        raise told from None


def _is_transient(error: BaseException | None) -> bool:
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__
    return error is not None


def _is_worth_retrying(_task: Task[..., Any], _task_run: TaskRun, state: State[Any]) -> bool:
    error = state.result(raise_on_failure=False)
    return isinstance(error, StepError) and error.transient
