"""Check the scaling of a build by KEDA."""

from collections.abc import Iterator
from typing import Final

from deploy.kustomized import Build, Document
from zlora.broker.keys import waiting_lists

PARAMETERS: Final = {
    "address",
    "username",
    "password",
}  # parameters of KEDA's trigger `redis` from the Secret
DATABASE: Final = "0"  # in the README's address


def scaling(found: Build) -> Iterator[str]:
    """Check that the triggers count the waiting and running jobs, and what is scaled."""
    for autoscaler in found.of("HorizontalPodAutoscaler"):
        target = autoscaler["spec"]["scaleTargetRef"]
        owners = [
            one for one in found.of(target["kind"]) if one["metadata"]["name"] == target["name"]
        ]
        if len(owners) != 1 or "replicas" in owners[0]["spec"]:
            yield f"HorizontalPodAutoscaler: expected {target}, without a number of its own"
    queue = found.variables(found.worker())["ZLORA_QUEUE"]
    for scaled in found.of("ScaledObject"):
        spec, triggers = scaled["spec"], scaled["spec"]["triggers"]
        if spec["scaleTargetRef"] != {"name": "zlora-worker"}:
            yield f"ScaledObject: {spec['scaleTargetRef']} are not the workers"
        lists = [trigger["metadata"]["listName"] for trigger in triggers]
        if sorted(lists) != sorted([*waiting_lists(queue), "unacked"]):
            yield f"ScaledObject: {lists} are not the queue's lists and `unacked`"
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
    if parameters != PARAMETERS:
        yield f"trigger {name}: expected {sorted(PARAMETERS)}, not {sorted(parameters)}"
