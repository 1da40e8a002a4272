"""Deploying over HTTP: PUT and DELETE of a deployment.

A wing of astera_lite, which loads this file when the first such request comes.
"""

from __future__ import annotations

import contextlib
import json
import os

from astera_lite import (
    CONNECTIONS_FILE,
    FLOW_NAME,
    JSON_TYPE,
    NO_STORE,
    AccessError,
    Conflict,
    Deployer,
    Exchange,
    FlowError,
    InputError,
    NotFound,
    Reply,
    check_coding,
    check_conditions,
    deployment_document,
    is_json_type,
    json_body,
    log,
    parse_flow_text,
    shown,
)


def check_may_deploy(x: Exchange) -> None:
    """Raise AccessError for all but a token of role admin: a flow can run programs."""
    if x.caller.admin and x.caller.name:
        return
    if x.caller.name:
        raise AccessError(403, "Deploying needs a token of role admin.", "insufficient_scope")
    detail = "Deploying needs a token of role admin, and this server has no tokens: set `token`, and send it."
    raise AccessError(403, detail)


def _file_of(deployer: Deployer, name: str) -> str:
    """The path of a deployment's file; raises NotFound, Conflict."""
    if not FLOW_NAME.fullmatch(name):
        raise NotFound(f"{shown(name)} is no name of a deployment: letters, digits, - and _.")
    if name + ".json" == CONNECTIONS_FILE:
        raise Conflict(f"{CONNECTIONS_FILE} holds the connections: choose another name.")
    if deployer.folder is None or name in deployer.own:
        raise Conflict("It is published by the program that embeds this server, not by a file.")
    if os.path.exists(os.path.join(deployer.folder, f"{name}.toml")):
        raise Conflict(f"It is kept in {name}.toml: change that file.")
    return os.path.join(deployer.folder, f"{name}.json")


def _write_atomically(path: str, text: str) -> None:
    """Write a file so that a reader, and a start after a crash, find the old text or the new one, whole."""
    folder, name = os.path.split(path)
    part = os.path.join(folder, f".{name}.part")
    os.makedirs(folder, exist_ok=True)
    with open(part, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def deploy(x: Exchange) -> Reply:
    """PUT /api/deployments/{name}: check the flow in the body, write its file, publish it."""
    check_coding(x)
    name, media = x.values["name"], x.head.headers.get("content-type", "").partition(";")[0].strip().lower()
    if not is_json_type(media):
        message = "must be application/json: a flow"
        raise InputError([{"in": "header", "name": "Content-Type", "message": message}], status=415)
    deployer = x.app.deployer
    with deployer.changing:
        path = _file_of(deployer, name)
        file, known = os.path.basename(path), deployer.deployments.by_name.get(name)
        check_conditions(x, known is not None or os.path.exists(path), known)
        try:
            tree = parse_flow_text(x.body.decode(), file)
            flow = deployer.build(tree, name, file)
            deployments = deployer.replaced(name, flow)
        except UnicodeDecodeError as error:
            message = f"byte {error.start} is not valid UTF-8"
            raise InputError([{"in": "body", "name": "", "message": message}], "The flow has faults.") from None
        except FlowError as error:
            faults = [{"in": "body", "name": fault.place, "message": fault.message} for fault in error.faults]
            raise InputError(faults, "The flow has faults.") from None
        _write_atomically(path, json.dumps(tree, indent=2, ensure_ascii=False) + "\n")
        deployer.deployments = deployments
    log.info("deployed %s", name)
    headers = [JSON_TYPE, NO_STORE] + [("Location", f"{x.base}/api/deployments/{name}")] * (known is None)
    return Reply(201 if known is None else 200, headers, json_body(deployment_document(flow, x.base)))


def undeploy(x: Exchange) -> Reply:
    """DELETE /api/deployments/{name}: take a flow out of service, and delete its file."""
    name, deployer = x.values["name"], x.app.deployer
    with deployer.changing:
        path = _file_of(deployer, name)
        flows = deployer.deployments.by_name
        if name not in flows and not os.path.exists(path):
            raise NotFound(f"There is no deployment {shown(name)}.")
        check_conditions(x, True, flows.get(name))
        callers = [flow.name for flow in flows.values() if name in [called for called, _ in flow.calls]]
        if callers:
            raise Conflict(f"It is called by {', '.join(callers)}.")
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        deployer.deployments = deployer.replaced(name)
    log.info("deleted the deployment %s", name)
    return Reply(204, [NO_STORE])
