//! `adopt`, `swap`, `drain` and `recover`.

use super::{AdoptArguments, DrainArguments, RecoverArguments, SwapArguments, labels, print_json};
use crate::{
    control::{
        AdoptRequest, DrainDone, DrainRequest, RecoverDone, RecoverRequest, SwapDone, SwapRequest,
        client::Client,
    },
    instance::Instance,
    migrate::recovery::Decision,
};

pub(super) async fn adopt(client: &Client, arguments: AdoptArguments) -> anyhow::Result<()> {
    // A relative path is relative to where the person is, not to where the agent is.
    let cgroup = if arguments.cgroup.is_relative() && arguments.cgroup.is_dir() {
        std::path::absolute(arguments.cgroup)?
    } else {
        arguments.cgroup
    };
    let request = AdoptRequest { cgroup, name: arguments.name, labels: labels::by_key(arguments.labels) };
    let adopted: Instance = client.post("/v1/adopt", &request).await?;
    if arguments.output.json {
        return print_json(&adopted);
    }
    println!("{} is {}", adopted.name, adopted.cgroup.display());
    Ok(())
}

pub(super) async fn swap(client: &Client, arguments: SwapArguments) -> anyhow::Result<()> {
    let request = SwapRequest { instance: arguments.instance, pool: arguments.pool };
    let done: SwapDone = client.post("/v1/swap", &request).await?;
    if arguments.output.json {
        return print_json(&done);
    }
    println!("{} sits on {} now ({:.1} ms)", done.instance, done.pool, done.duration_ms);
    Ok(())
}

pub(super) async fn drain(client: &Client, arguments: DrainArguments) -> anyhow::Result<()> {
    let request = DrainRequest { pool: arguments.pool, undo: arguments.undo };
    let done: DrainDone = client.post("/v1/drain", &request).await?;
    if arguments.output.json {
        return print_json(&done);
    }
    let DrainDone { pool, draining, acts } = done;
    match (draining, acts) {
        (false, _) => println!("{pool} may be used again"),
        (true, true) => {
            println!("{pool} is being emptied: see `rswap ps`, and `rswap plan` for who can't leave")
        }
        (true, false) => println!("{pool} is to be emptied, but this agent observes only: see `rswap plan`"),
    }
    Ok(())
}

pub(super) async fn recover(client: &Client, arguments: RecoverArguments) -> anyhow::Result<()> {
    let decision = if arguments.here { Decision::Here } else { Decision::There };
    let request = RecoverRequest { instance: arguments.instance, decision };
    let done: RecoverDone = client.post("/v1/recover", &request).await?;
    if arguments.output.json {
        return print_json(&done);
    }
    match done.decision {
        Decision::Here => println!(
            "{} goes on HERE, by your decision. If it runs at the other host too, stop it there now: both have its \
             address, and what one of them acknowledges the other does not know",
            done.instance
        ),
        Decision::There => println!(
            "the copy of {} here is REMOVED, by your decision. If it does not run at the other host, it is gone",
            done.instance
        ),
    }
    Ok(())
}
