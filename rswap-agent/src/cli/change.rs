//! `adopt` and `swap`.

use super::{AdoptArguments, SwapArguments, labels, print_json};
use crate::{
    control::{AdoptRequest, SwapDone, SwapRequest, client::Client},
    instance::Instance,
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
