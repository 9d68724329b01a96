"""From a spec to what a shim is asked for. Pure."""

from __future__ import annotations

from sandkeeper.api import ContainerSpec, SecurityContext, Volume
from sandkeeper.api.quantity import parse_bytes, parse_cpu_millis
from sandkeeper.control.observation import Assignment, Observation
from sandkeeper.wire import node_pb2
from sandkeeper.wire.ids import OwnerKey

_NETWORKS = {"None": node_pb2.NETWORK_NONE, "Host": node_pb2.NETWORK_HOST}
_RESTART_POLICIES = {
    "Never": node_pb2.RESTART_POLICY_NEVER,
    "OnFailure": node_pb2.RESTART_POLICY_ON_FAILURE,
    "Always": node_pb2.RESTART_POLICY_ALWAYS,
}
_PULL_POLICIES = {
    "IfNotPresent": node_pb2.IMAGE_PULL_POLICY_IF_NOT_PRESENT,
    "Always": node_pb2.IMAGE_PULL_POLICY_ALWAYS,
    "Never": node_pb2.IMAGE_PULL_POLICY_NEVER,
}


def owner_key(o: Observation, assignment: Assignment) -> OwnerKey:
    """Who an assigned instance belongs to; its sandbox id on the node follows from it."""
    return OwnerKey(namespace=o.namespace, name=o.name, uid=o.uid, instance=assignment.instance)


def sandbox_config(o: Observation, assignment: Assignment) -> node_pb2.SandboxConfig:
    """Create's options for the assigned instance of the observed object."""
    spec = o.sandbox.spec
    return node_pb2.SandboxConfig(
        owner=node_pb2.Owner(namespace=o.namespace, name=o.name, uid=o.uid, instance=assignment.instance),
        digest=assignment.digest,
        runtime=assignment.runtime,
        # A name may be a DNS subdomain; a host name is one label of it.
        hostname=spec.hostname or o.name.partition(".")[0][:63],
        network=_NETWORKS[spec.network],
        restart_policy=_RESTART_POLICIES[spec.restart_policy],
        containers=[_container(container) for container in spec.containers],
        volumes=[_volume(volume) for volume in spec.volumes],
        termination_grace_period_seconds=spec.termination_grace_period_seconds,
    )


def _container(container: ContainerSpec) -> node_pb2.ContainerConfig:
    limits = container.resources.limits
    return node_pb2.ContainerConfig(
        name=container.name,
        image=container.image,
        image_pull_policy=_PULL_POLICIES[container.pull_policy],
        command=container.command,
        args=container.args,
        env=[node_pb2.EnvVar(name=variable.name, value=variable.value) for variable in container.env],
        working_dir=container.working_dir,
        resources=node_pb2.Resources(
            cpu_millis=parse_cpu_millis(limits.cpu) if limits.cpu is not None else 0,
            memory_bytes=parse_bytes(limits.memory) if limits.memory is not None else 0,
            pids=limits.pids or 0,
        ),
        security_context=_security(container.security_context),
        volume_mounts=[
            node_pb2.VolumeMount(
                name=mount.name,
                mount_path=mount.mount_path,
                read_only=mount.read_only,
                sub_path=mount.sub_path,
            )
            for mount in container.volume_mounts
        ],
    )


def _security(context: SecurityContext) -> node_pb2.SecurityContext:
    return node_pb2.SecurityContext(
        run_as_user=context.run_as_user,
        run_as_group=context.run_as_group,
        run_as_non_root=context.run_as_non_root,
        read_only_root_filesystem=context.read_only_root_filesystem,
        allow_privilege_escalation=context.allow_privilege_escalation,
        capabilities_add=context.capabilities.add,
        capabilities_drop=context.capabilities.drop,
    )


def _volume(volume: Volume) -> node_pb2.Volume:
    limit = volume.empty_dir.size_limit
    return node_pb2.Volume(
        name=volume.name,
        memory=volume.empty_dir.medium == "Memory",
        size_limit_bytes=parse_bytes(limit) if limit is not None else 0,
    )
