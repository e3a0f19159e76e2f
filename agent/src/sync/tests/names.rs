//! `synchronous_standby_names`, as PostgreSQL reads it and Patroni writes it.

use proptest::prelude::*;

use super::*;

#[test]
fn values_are_written_as_patroni_writes_them() {
    let all = |names: &[&str]| SyncNames::all_of(&set(names)).to_string();
    let any = |count, names: &[&str]| SyncNames::any_of(count, &set(names)).to_string();
    assert_eq!(all(&[]), "");
    assert_eq!(all(&["node2"]), "node2");
    assert_eq!(all(&["node3", "node2"]), "2 (node2,node3)");
    assert_eq!(all(&["postgres-2"]), "\"postgres-2\"");
    assert_eq!(any(1, &["postgres-1"]), "ANY 1 (\"postgres-1\")");
    assert_eq!(any(2, &["b", "a"]), "ANY 2 (a,b)");
    assert_eq!(
        all(&["First", "ANY", "a$1", "1a", "é", "say \"hi\""]),
        "6 (\"1a\",\"ANY\",\"First\",a$1,\"say \"\"hi\"\"\",\"é\")"
    );
    assert_eq!(SyncNames::anybody(false).to_string(), "*");
    assert_eq!(SyncNames::anybody(true).to_string(), "ANY 1 (*)");
    let spare = SyncNames::first(1, vec!["b".into(), "a".into()]);
    assert_eq!(spare.to_string(), "1 (b,a)", "the order is the rank");
}

#[test]
fn values_are_read_as_postgresql_reads_them() {
    let names = |names: &[&str]| names.iter().map(|name| StandbyName::from(*name)).collect::<Vec<_>>();
    let first = |count, list: &[&str]| {
        Ok(SyncNames::First {
            count,
            names: names(list),
        })
    };
    let any = |count, list: &[&str]| {
        Ok(SyncNames::Any {
            count,
            names: names(list),
        })
    };
    for (text, value) in [
        ("", Ok(SyncNames::Off)),
        ("a", first(1, &["a"])),
        (" a , B\t", first(1, &["a", "B"])),
        ("1, 2", first(1, &["1", "2"])),
        ("*", first(1, &["*"])),
        ("2(a,b)", first(2, &["a", "b"])),
        ("first 02 (a, *)", first(2, &["a", "*"])),
        ("Any 1 (\"any\",\"a\"\"b\")", any(1, &["any", "a\"b"])),
        ("first_one, anyone, é1$", first(1, &["first_one", "anyone", "é1$"])),
        ("\"\"", first(1, &[""])),
        (" ", Err(SyncNamesError::Malformed)),
        ("a b", Err(SyncNamesError::Malformed)),
        ("a,", Err(SyncNamesError::Malformed)),
        ("any", Err(SyncNamesError::Malformed)),
        ("2a", Err(SyncNamesError::Malformed)),
        ("ANY (a)", Err(SyncNamesError::Malformed)),
        ("1 (a) b", Err(SyncNamesError::Malformed)),
        ("1 ()", Err(SyncNamesError::Malformed)),
        ("a-b", Err(SyncNamesError::Stray('-'))),
        ("\"a", Err(SyncNamesError::Unclosed)),
        ("0 (a)", Err(SyncNamesError::Count("0".to_owned()))),
        (
            "ANY 2147483648 (a)",
            Err(SyncNamesError::Count("2147483648".to_owned())),
        ),
    ] {
        assert_eq!(SyncNames::parse(text), value, "{text:?}");
    }
}

#[test]
fn what_a_value_guarantees_leaves_out_whatever_it_leaves_open() {
    assert_eq!(
        guc("2 (a,A,b)").guarantee(),
        (2, set(&["a", "b"])),
        "names differ by more than case"
    );
    assert_eq!(guc("1 (a,*)").guarantee(), (0, set(&[])));
    assert_eq!(guc("3 (a,b)").required(), set(&["a", "b"]));
    assert_eq!(guc("a,b").required(), set(&[]), "one of the two does");
    assert!(guc("2 (b,A)").same_as(&guc("2 (a,b)")) && guc("ANY 1 (b,a)").same_as(&guc("ANY 1 (a,b)")));
    assert!(
        !guc("1 (b,a)").same_as(&guc("1 (a,b)")),
        "the first is the one that is waited for"
    );
    assert!(!guc("ANY 1 (a)").same_as(&guc("a")) && !guc("*").same_as(&guc("a")) && guc("*").same_as(&guc("1 (*)")));
}

fn any_names() -> impl Strategy<Value = SyncNames> {
    let name = prop_oneof![Just("*".to_owned()), Just("First".to_owned()), "[a-c1é_$ \",()-]{0,4}"];
    let names = prop::collection::vec(name.prop_map(StandbyName::new), 1..5);
    (1_u32..5, names, any::<bool>()).prop_map(|(count, names, any)| match any {
        true => SyncNames::Any { count, names },
        false => SyncNames::First { count, names },
    })
}

proptest! {
    #[test]
    fn a_value_survives_its_text(value in any_names()) {
        prop_assert_eq!(SyncNames::parse(&value.to_string()), Ok(value));
    }

    #[test]
    fn any_text_is_read_or_refused_and_what_is_read_is_kept(text in "[aF1*,() \"é-]{0,12}|(ANY|first|2) ?[0-9]{0,2} ?\\([a-c, ]{0,6}\\)") {
        if let Ok(value) = SyncNames::parse(&text) {
            prop_assert_eq!(SyncNames::parse(&value.to_string()), Ok(value));
        }
    }
}
