"""CPU time of the server for a status poll and for a fetch of the result of a job that has just ended.

Floor ×1.2, aim ×0.8 of a synchronous call of the same flow. The three take turns on 64 connections, each with a job of
its own; ratios are made within a round.
"""

from common import SUBMIT, SYNC, Server, arguments, cpu_seconds, ours, spread, table


def microseconds(server: Server, mode: str, path: str, seconds: float) -> float:
    """CPU time of the server for one request."""
    before = cpu_seconds(server.pid)
    figures = server.load(mode, path, 64, seconds)
    return (cpu_seconds(server.pid) - before) / figures["requests"] * 1e6


def main() -> None:
    args = arguments(__doc__, seconds=2.0, rounds=5)
    cost: dict[str, list[float]] = {"status": [], "result": [], "call": []}
    with ours() as server:
        for _ in range(args.rounds):
            status = server.finished_job(SUBMIT)
            cost["status"].append(microseconds(server, "get", status, args.seconds))
            cost["result"].append(microseconds(server, "get", status.removesuffix("status") + "result", args.seconds))
            cost["call"].append(microseconds(server, "sync", SYNC, args.seconds))
    rows = []
    for name, label in (("status", "status poll of a job that has just ended"), ("result", "fetch of its result")):
        ratio = spread([mine / call for mine, call in zip(cost[name], cost["call"], strict=True)])
        rows.append((f"CPU of a {label}", "×1.2", "×0.8", f"×{ratio}, {spread(cost[name], '{:.0f}')} µs"))
    rows.append(("CPU of a synchronous call", "", "", f"{spread(cost['call'], '{:.0f}')} µs"))
    print(table(rows))


if __name__ == "__main__":
    main()
