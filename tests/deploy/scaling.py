"""What is wrong with the scaling of a build, by KEDA's names."""

from collections.abc import Iterator
from typing import Final

from deploy.kustomized import Build, Document
from zlora.broker.keys import waiting_lists

ASKED: Final = {
    "address",
    "password",
}  # parameters of KEDA's trigger `redis` that come from the Secret
DATABASE: Final = "0"  # of the README's address


def scaling(found: Build) -> Iterator[str]:
    """Each trigger reads a list of the queue's, or what its workers hold, and all together scale the workers."""
    queue = found.told(found.worker())["ZLORA_QUEUE"]
    for scaled in found.of("ScaledObject"):
        spec, triggers = scaled["spec"], scaled["spec"]["triggers"]
        if spec["scaleTargetRef"] != {"name": "zlora-worker"}:
            yield f"ScaledObject: {spec['scaleTargetRef']} are not the workers"
        lists = [trigger["metadata"]["listName"] for trigger in triggers]
        if sorted(lists) != sorted([*waiting_lists(queue), "unacked"]):
            yield f"ScaledObject: {lists} are not the queue's lists and what its workers hold"
        formula = spec["advanced"]["scalingModifiers"]["formula"]
        if sorted(formula.split(" + ")) != sorted(trigger["name"] for trigger in triggers):
            yield f"ScaledObject: {formula}: not the sum of its triggers"
        for trigger in triggers:
            yield from _trigger(found, trigger)


def _trigger(found: Build, trigger: Document) -> Iterator[str]:
    name, metadata = trigger["name"], trigger["metadata"]
    if trigger["type"] != "redis" or metadata.keys() != {"listName", "databaseIndex"}:
        yield f"trigger {name}: {trigger['type']} {sorted(metadata)}"
    elif metadata["databaseIndex"] != DATABASE:
        yield f"trigger {name}: not the broker's database"
    wanted = trigger["authenticationRef"]["name"]
    known = [one for one in found.of("TriggerAuthentication") if one["metadata"]["name"] == wanted]
    parameters = {
        reference["parameter"] for one in known for reference in one["spec"]["secretTargetRef"]
    }
    if parameters != ASKED:
        yield f"trigger {name}: its authentication has {sorted(parameters)}, and not {sorted(ASKED)}"
