//! How command lines are read.

use super::*;

fn parse(line: &str) -> Result<Cli, clap::Error> {
    Cli::try_parse_from(line.split_whitespace())
}

#[test]
fn the_command_definition_is_consistent() {
    use clap::CommandFactory;
    Cli::command().debug_assert();
}

#[test]
fn run_takes_everything_after_the_dashes_as_the_command() {
    let line = "rswap run --name db --label tier=gold --label app=redis --pool fast --net 10.0.0.5/24,gw=10.0.0.1 \
                --detach --log /tmp/x -- redis-server --port 7000 --name other";
    let Command::Run(run) = parse(line).unwrap().command else { panic!("not run") };
    assert_eq!(run.command, ["redis-server", "--port", "7000", "--name", "other"]);
    assert_eq!(labels::by_key(run.labels)["app"], "redis");
    let network = local::network_of(run.net).unwrap().unwrap();
    assert_eq!((network.prefix_len, network.gateway), (24, Some([10, 0, 0, 1].into())));
    assert_eq!(network.ipv6, None);
    assert!(run.detach && run.log.is_some());
}

#[test]
fn an_instance_has_an_address_of_each_family_at_most() {
    let network = |addresses: &str| {
        let Command::Run(run) = parse(&format!("rswap run {addresses} -- true")).unwrap().command else {
            panic!("not run")
        };
        local::network_of(run.net)
    };
    assert_eq!(network("").unwrap(), None);
    let both = network("--net fd00::5/64,gw=fd00::1 --net 10.0.0.5/24").unwrap().unwrap();
    assert_eq!((both.address, both.gateway), ([10, 0, 0, 5].into(), None));
    let ipv6 = both.ipv6.unwrap();
    assert_eq!((ipv6.address.to_string().as_str(), ipv6.prefix_len), ("fd00::5", 64));
    assert_eq!(ipv6.gateway, Some("fd00::1".parse().unwrap()));
    for wrong in [
        "--net fd00::5/64",
        "--net 10.0.0.5/24 --net 10.0.0.6/24",
        "--net 10.0.0.5/24 --net ::1/64 --net ::2/64",
    ] {
        assert!(network(wrong).is_err(), "{wrong}");
    }
}

#[test]
fn what_is_wrong_is_said_at_once() {
    for (line, word) in [
        ("rswap run", "COMMAND"),
        ("rswap run --label x -- true", "KEY=VALUE"),
        ("rswap run --log x -- true", "--detach"),
        ("rswap run --name A/b -- true", "instance name"),
        ("rswap run --net 10.0.0.5 -- true", "PREFIX"),
        ("rswap run --net 10.0.0.5/33 -- true", "PREFIX"),
        ("rswap run --net 10.0.0.5/24,gw=x -- true", "PREFIX"),
        ("rswap run --net 10.0.0.5/24,gw=::1 -- true", "PREFIX"),
        ("rswap run --net fe80::5/129 -- true", "PREFIX"),
        ("rswap swap db", "POOL"),
        ("rswap migrate db", "HOST"),
        ("rswap adopt /x", "--name"),
    ] {
        let error = parse(line).unwrap_err().to_string();
        assert!(error.contains(word), "{line}: {error}");
    }
}

#[test]
fn global_options_stand_anywhere() {
    for line in ["rswap --socket /s --config /c ps --json", "rswap ps --json --config /c --socket /s"] {
        let cli = parse(line).unwrap();
        assert_eq!((cli.socket.unwrap(), cli.config.unwrap()), ("/s".into(), "/c".into()));
        assert!(matches!(cli.command, Command::Ps(Output { json: true })));
    }
}

#[test]
fn the_internal_command_is_read_as_it_is_written() {
    let Command::Init(init) = parse("rswap __init --go=3 --detach --stub=7 --link=4").unwrap().command else {
        panic!()
    };
    assert_eq!((init.go, init.detach, init.stub, init.link), (3, true, Some(7), Some(4)));
    let line = "rswap __init --go=3 --stub=7 --link=4 --monotonic-ns=-5 --boottime-ns=6";
    let Command::Init(init) = parse(line).unwrap().command else { panic!() };
    assert_eq!((init.monotonic_ns, init.boottime_ns), (Some(-5), Some(6)));
    let Command::Init(init) = parse("rswap __init --go=3 -- sh -c x").unwrap().command else { panic!() };
    assert_eq!(init.command, ["sh", "-c", "x"]);
}
