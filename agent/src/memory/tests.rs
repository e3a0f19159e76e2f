//! A rewind that cannot be done is told from one whose source did not answer.

use super::*;

const NOW: Boottime = Boottime::from_nanos(1_000_000_000_000);

fn epoch() -> Epoch {
    Epoch {
        holder: MemberName::new("n2").expect("a name"),
        create_revision: 7,
    }
}

fn rewinding() -> Memory {
    let mut memory = Memory::default();
    memory.stepped(&Step::Rewind { leader: epoch() }, NOW);
    memory
}

#[test]
fn a_source_that_did_not_answer_is_asked_again_and_not_for_ever() {
    let mut memory = rewinding();
    for _ in 1..REWINDS_PUT_OFF_MAX {
        memory.job_ended(JobKind::Rewind, Ok(Outcome::RewindPutOff), NOW);
        assert_eq!(memory.rewound_under, None, "it is tried again");
        assert_eq!(memory.backoff_until, Some(NOW + BACKOFF), "not at once");
        memory.stepped(&Step::Rewind { leader: epoch() }, NOW);
    }
    memory.job_ended(JobKind::Rewind, Ok(Outcome::RewindPutOff), NOW);
    assert_eq!(memory.rewound_under, Some(epoch()), "it is copied anew");
    assert_eq!(memory.rewind_refused_under, None, "and not removed before that");
}

#[test]
fn only_the_word_of_pg_rewind_makes_a_rewind_one_that_cannot_be_done() {
    let mut memory = rewinding();
    memory.job_ended(JobKind::Rewind, Err("a mount point cannot be moved".to_owned()), NOW);
    assert_eq!(memory.rewound_under, Some(epoch()), "it is copied anew");
    assert_eq!(memory.rewind_refused_under, None);
    memory.job_ended(JobKind::Rewind, Ok(Outcome::RewindRefused), NOW);
    assert_eq!(memory.rewind_refused_under, Some(epoch()));
}
