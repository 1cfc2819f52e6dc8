use super::{super::layout, *};

#[test]
fn what_could_not_be_read_of_one_process_is_looked_for_in_the_next() {
    let own = std::process::id() as i32;
    let is_code =
        |mapping: &Mapping| mapping.protection & libc::PROT_EXEC != 0 && mapping.name.contains("libc");
    let code = layout::read_mappings(own).expect("list").into_iter().find(is_code).expect("a C library");
    let mut ended = std::process::Command::new("true").spawn().expect("start");
    ended.wait().expect("wait");
    let found = places(ended.id() as i32, &code);
    assert!(found.call.is_none() && found.restorer.is_none(), "{found:?}");
    let found = places(own, &code);
    assert!(found.call.is_some() && found.restorer.is_some(), "{found:?}");
}
