//! What a configuration may say, and what an error about it says.

use rswap_pools::Member;
use rswap_types::CpuSet;

use super::*;
use crate::forecast::Quantile;

fn parse(text: &str) -> Result<Config, ConfigError> {
    Config::parse(text, Path::new("rswap.toml"))
}

fn error(text: &str) -> String {
    parse(text).unwrap_err().to_string()
}

#[test]
fn nothing_is_needed() {
    let config = parse("").unwrap();
    assert_eq!(config, Config::default());
    assert_eq!(config.agent.mode, Mode::Observe);
    assert_eq!(config.migrate.listen, None);
}

#[test]
fn a_whole_file() {
    let config = parse(
        r#"
        [agent]
        host = "a"
        mode = "act"
        window_ms = 250
        [migrate]
        listen = "10.0.0.1:7791"
        [forecast]
        horizons_ms = [5000, 1000]
        [plan]
        quantile = "p99"
        [[pool]]
        name = "slow"
        cpus = "0-1,3"
        cost_per_core_hour = 0.01
        performance = 0.5
        [[pool]]
        name = "b"
        host = "10.0.0.2:7791"
        cores = 4
        memory_gib = 8
        "#,
    )
    .unwrap();
    assert_eq!(config.agent.mode, Mode::Act);
    assert_eq!(config.forecast.horizons_ms, [1000, 5000]);
    assert_eq!(config.plan.quantile, Quantile::P99);
    assert_eq!(
        config.pools[0].kind,
        PoolKindConfig::Local {
            member: Member::Cpus(CpuSet::from([0, 1, 3])),
            capacity: None,
            cost_per_hour: Some(0.01),
            performance: Some(0.5),
            operations_per_s: None,
            bytes_per_s: None,
            volumes: None,
            instance_rate: None,
            share: Default::default(),
        }
    );
    assert!(matches!(config.pools[1].kind, PoolKindConfig::Host { cores: 4.0, memory_gib: 8.0, .. }));
}

#[test]
fn errors_name_file_line_and_key() {
    let unknown = error("[agent]\nhost = \"a\"\nwindow = 3\n");
    assert!(unknown.starts_with("rswap.toml:3: agent.window: unknown field"), "{unknown}");

    let wrong_type = error("[plan]\n\nthreshold = \"much\"\n");
    assert!(wrong_type.starts_with("rswap.toml:3: plan.threshold: invalid type"), "{wrong_type}");

    let out_of_range = error("[plan]\nheadroom = 1.5\n");
    assert!(out_of_range.starts_with("rswap.toml:2: plan.headroom: 1.5 is not a share"), "{out_of_range}");

    let mode = error("[agent]\nmode = \"guess\"\n");
    assert!(mode.starts_with("rswap.toml:2: agent.mode: unknown variant"), "{mode}");

    let syntax = error("[agent]\nhost = \n");
    assert!(syntax.starts_with("rswap.toml:2: "), "{syntax}");
}

#[test]
fn errors_in_pools_name_the_pool() {
    let cpus = error("[[pool]]\nname = \"a\"\ncpus = \"0\"\n[[pool]]\nname = \"b\"\ncpus = \"3-1\"\n");
    assert!(cpus.starts_with("rswap.toml:6: pool[1]"), "{cpus}");
    assert!(cpus.contains("ends before it starts"), "{cpus}");

    let both = error("[[pool]]\nname = \"a\"\ncpus = \"0\"\nhost = \"1.2.3.4:5\"\n");
    assert!(both.contains("pool[0]") && both.contains("not both"), "{both}");

    let half = error("[[pool]]\nname = \"a\"\nhost = \"1.2.3.4:5\"\ncores = 2\n");
    assert!(half.contains("`memory_gib`"), "{half}");

    let twice = error("[[pool]]\nname = \"a\"\ncpus = \"0\"\n[[pool]]\nname = \"a\"\ncpus = \"1\"\n");
    assert!(twice.contains("pool") && twice.contains("is taken"), "{twice}");
}

#[test]
fn local_pools_are_named_limited_and_refused_with_their_keys() {
    let config = parse(
        "[pools]\nfull_below_share = 0.1\n[[pool]]\nname='far'\nnodes='1'\ncost_per_gib_hour=0.001\n\
         [[pool]]\nname='data'\nstorage='/srv'\ncapacity_gib=2\n[[pool]]\nname='up'\nlink='eth0'\ncapacity_gbit_per_s=10\n",
    )
    .unwrap();
    let settings = settings(&config);
    let limits: Vec<_> = settings.pools.iter().map(|pool| (pool.key.as_str(), pool.capacity)).collect();
    assert_eq!(
        limits,
        [("pool[0]", None), ("pool[1]", Some(2.0 * (1u64 << 30) as f64)), ("pool[2]", Some(1e10))]
    );
    assert_eq!(settings.full_below_share, 0.1);

    for (text, key, said) in [
        ("[[pool]]\nname='a'\nstorage='srv'\n", "pool[0].storage", "absolute"),
        ("[[pool]]\nname='a'\nlink='not a name'\n", "pool[0].link", "interface"),
        ("[[pool]]\nname='a'\nnodes=''\n", "pool[0].nodes", "at least one"),
        (
            "[[pool]]\nname='a'\nlink='e'\ncapacity_gib=1\n",
            "pool[0]",
            "`capacity_gib` does not belong to a link",
        ),
        ("[[pool]]\nname='a'\ncpus='0'\nnodes='0'\n", "pool[0]", "not both"),
        ("[[pool]]\nname='a'\nstorage='/s'\ncapacity_gib=-1\n", "pool[0].capacity_gib", "above 0"),
        ("[pools]\nfull_below_share = 1\n", "pools.full_below_share", "share"),
    ] {
        let error = error(text);
        assert!(error.contains(&format!(": {key}: ")) && error.contains(said), "{error}");
    }
}

#[test]
fn a_named_file_must_exist() {
    let error = Config::load(Some(Path::new("/nonexistent/rswap.toml"))).unwrap_err();
    assert!(error.to_string().contains("/nonexistent/rswap.toml"));
}

proptest::proptest! {
    #[test]
    fn any_text_is_read_or_refused(text in ".{0,200}") {
        let _ = parse(&text);
    }
}

#[test]
fn volumes_go_to_storage_pools_that_name_a_directory_in_them() {
    let pool = |rest: &str| format!("[[pool]]\nname='ssd'\n{rest}\n");
    let config = Config::parse(&pool("storage='/srv'\nvolumes='/srv/rswap'"), Path::new("t")).unwrap();
    assert_eq!(super::volume_pool(&config, "ssd").map(|pool| pool.directory), Ok("/srv/rswap".into()));
    assert!(super::volume_pool(&config, "hdd").unwrap_err().contains("no storage pool"));
    let without = Config::parse(&pool("storage='/srv'"), Path::new("t")).unwrap();
    assert!(super::volume_pool(&without, "ssd").unwrap_err().contains("no directory for volumes"));
    assert!(error(&pool("storage='/srv'\nvolumes='/elsewhere'")).contains("does not lie in its storage"));
    assert!(error(&pool("cpus='0'\nvolumes='/srv/rswap'")).contains("does not belong"));
}

#[test]
fn links_are_secured_or_in_the_clear_and_never_half() {
    let files = "ca = \"/c\"\ncertificate = \"/d\"\nkey = \"/k\"\n";
    assert_eq!(parse("").unwrap().tls, TlsConfig::None);
    assert_eq!(parse("[tls]\n").unwrap().tls, TlsConfig::None);
    assert_eq!(parse("[tls]\ninsecure_clear_text = false\n").unwrap().tls, TlsConfig::None);
    assert_eq!(parse("[tls]\ninsecure_clear_text = true\n").unwrap().tls, TlsConfig::ClearText);
    let (ca, certificate, key) = ("/c".into(), "/d".into(), "/k".into());
    let allow = Some(["a", "b"].map(|name| name.parse().unwrap()).into());
    let secured = parse(&format!("[tls]\n{files}allow = [\"b\", \"a\"]\n")).unwrap().tls;
    assert_eq!(secured, TlsConfig::Files { ca, certificate, key, allow });
    for wrong in [
        "ca = \"/c\"\n",
        "ca = \"/c\"\ncertificate = \"/d\"\n",
        "allow = [\"a\"]\n",
        &format!("{files}insecure_clear_text = true\n"),
        &format!("{files}allow = [\"no name\"]\n"),
        &format!("{files}allowed = [\"a\"]\n"),
        "allow = []\ninsecure_clear_text = true\n",
    ] {
        assert!(error(&format!("[tls]\n{wrong}")).contains("tls"), "{wrong}");
    }
}

#[test]
fn only_other_hosts_have_a_certificate_name() {
    let host = "[[pool]]\nname = \"b\"\nhost = \"10.0.0.2:7791\"\ncores = 4\nmemory_gib = 8\n";
    let named = parse(&format!("{host}certificate_name = \"b.example.org\"\n")).unwrap();
    let PoolKindConfig::Host { certificate_name, .. } = &named.pools[0].kind else { panic!("no host") };
    assert_eq!(certificate_name.as_ref().map(|name| name.as_str()), Some("b.example.org"));
    let slow = "[[pool]]\nname = \"slow\"\ncpus = \"0\"\ncertificate_name = \"b\"\n";
    assert!(error(slow).contains("`certificate_name` does not belong to"), "{}", error(slow));
}

#[test]
fn a_grant_is_of_a_user_or_of_a_group() {
    let grant = |text: &str| format!("[[control.grant]]\n{text}");
    let config =
        parse(&(grant("uid = 7\nright = \"read\"\n") + &grant("gid = 8\nright = \"operate\"\n"))).unwrap();
    let grants = [Grant::User { uid: 7, right: Right::Read }, Grant::Group { gid: 8, right: Right::Operate }];
    assert_eq!(config.control.grants, grants);
    for wrong in [
        "right = \"read\"\n",
        "uid = 7\n",
        "uid = 7\ngid = 8\nright = \"read\"\n",
        "uid = -1\nright = \"read\"\n",
        "uid = 7\nright = \"all\"\n",
        "uid = 7\nname = \"x\"\nright = \"read\"\n",
    ] {
        assert!(error(&grant(wrong)).contains("control.grant"), "{wrong}");
    }
    assert!(error("[control]\naudit_kib = 0\n").contains("control.audit_kib"));
}
