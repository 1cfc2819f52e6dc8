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

#[test]
fn the_documents_of_the_api_are_those_that_the_code_makes() {
    for (of, name) in [(Serving::Agent, "agent"), (Serving::Controller, "controller")] {
        let file = format!("{}/../docs/openapi-{name}.json", env!("CARGO_MANIFEST_DIR"));
        let kept: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(&file).unwrap()).unwrap();
        assert!(
            kept == of.document(),
            "the routes or their types have changed. Look whether whoever uses them still can (members are added, not renamed or \
             removed), then renew docs/openapi-{name}.json: cargo run --bin rswap -- openapi {name} > docs/openapi-{name}.json"
        );
    }
}

/// All values of this key, wherever they are.
fn all<'d>(value: &'d serde_json::Value, key: &str, found: &mut Vec<&'d serde_json::Value>) {
    match value {
        serde_json::Value::Object(members) => {
            found.extend(members.get(key));
            members.values().for_each(|value| all(value, key, found));
        }
        serde_json::Value::Array(values) => values.iter().for_each(|value| all(value, key, found)),
        _ => {}
    }
}

#[test]
fn every_operation_says_what_it_is_and_what_each_answer_looks_like() {
    for document in [Serving::Agent.document(), Serving::Controller.document()] {
        let mut references = Vec::new();
        all(&document, "$ref", &mut references);
        assert!(references.len() > 50, "{}", references.len());
        for reference in references {
            let to = reference.as_str().unwrap().strip_prefix('#').unwrap();
            assert!(document.pointer(to).is_some(), "there is no {to}");
        }
        let mut said = Vec::new();
        for (path, item) in document["paths"].as_object().unwrap() {
            for (method, operation) in item.as_object().unwrap() {
                let place = format!("{method} {path}");
                assert!(operation["summary"].as_str().is_some_and(|text| text.len() > 10), "{place}");
                let responses = operation["responses"].as_object().unwrap();
                assert!(responses.contains_key("200") && responses.contains_key("default"), "{place}");
                for (status, response) in responses {
                    assert!(!response["description"].as_str().unwrap().is_empty(), "{place}: {status}");
                    let content = response["content"].as_object().unwrap();
                    assert!(!content.is_empty(), "{place}: {status}");
                    let is_error = status == "default" || status.parse::<u16>().unwrap() >= 400;
                    let is_page = path == "/" || path.starts_with("/page/");
                    for (kind, media) in content {
                        assert!(media["schema"].is_object(), "{place}: {status} {kind}");
                        assert!(
                            !is_error || kind == "application/problem+json" || is_page,
                            "{place}: {status}"
                        );
                    }
                }
                let bodies = operation["requestBody"]["content"]["application/json"]["schema"].is_object();
                assert!(bodies || method == "get" || path == "/v1/roll/end", "{place} has no body");
                said.push(operation["operationId"].as_str().unwrap());
            }
        }
        let count = said.len();
        said.sort_unstable();
        said.dedup();
        assert_eq!(said.len(), count, "two operations have one name");
        // Every type, every member and every kind says what it is.
        for (name, schema) in document["components"]["schemas"].as_object().unwrap() {
            assert!(schema["description"].is_string(), "{name} says nothing");
            let mut members = Vec::new();
            all(schema, "properties", &mut members);
            for (member, schema) in members.into_iter().flat_map(|all| all.as_object().unwrap()) {
                // What may be null is one of two; the first one says what it is.
                let says = |schema: &serde_json::Value| schema["description"].is_string();
                let is_kind = schema["enum"].is_array();
                assert!(
                    says(schema) || says(&schema["oneOf"][0]) || is_kind,
                    "{name}.{member} says nothing: {schema}"
                );
            }
        }
        let read = oas3::from_json(document.to_string()).unwrap();
        assert_eq!(read.operations().count(), count);
        assert!(read.openapi.starts_with("3.1"), "{}", read.openapi);
    }
}
