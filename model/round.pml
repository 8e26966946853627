/* A bounded model of the round (docs/protocol.md): which lists get certified, which sums can be opened, and what a
 * retry may do. docs/model.md says what is left out and why the order of events below loses no attack.
 *
 * The coordinator is every `if` without a rule: it picks lists, recipients, silence and retries freely, sees all that
 * was ever sent, and has the colluders' keys. Honest members act by the rules marked M2 to M9, (a), (b) and (c).
 *
 * A set of members is a mask; member i is bit i. Members 0..HN-1 are honest, the last C collude. In the text of a
 * trail #5 stands for the set {0, 2}.
 */

#include "settings.pml"

bool P1 = true, P2 = true, P3 = true, P4 = true, P5 = true, P6 = true, P7 = true;
bool not_reached = true;

/* --- what outlives a round, by honest member */
byte rounds;    /* counted only where ROUNDS bounds them */
byte out;       /* spent, and no proof: out for this stage */
byte bond[HN];  /* by (c): the only list it still signs, 0 if none */
byte open[HN];  /* the list of an openable round with its delta, 0 if none */
byte came[HN];  /* the proofs it retried by, where REACH asks */

/* --- one round. g: a key list (T1); h = 2g, 2g+1: a U2 under it (T2); q = 2h, 2h+1: a survivor list under that (L).
 * Two of each, since a third could not collect signatures either. Equal member sets in two places are lists that
 * differ in what a colluder signed: its M1, its share root, its upload. docs/protocol.md names the rest. */
byte u1[2];      /* the key list */
byte dealt[2];   /* honest members that took it as M2 and sent M3 under it */
byte u2[4];      /* the sharers */
byte spent[4];   /* honest members that took it as M4: SPENT, and M5 signed under this T2 */
byte u3[8];      /* survivor lists that got their certificate, 0 otherwise */
byte signers[8]; /* honest members whose M7 is on it */
byte shares[8];  /* honest members whose M9 for it has left */
byte statements; /* honest members whose abort statement has left */
byte released;   /* disk: RELEASED */
byte aborted;    /* disk: ABORTED */
byte up = HONEST; /* members that still have the round's secrets; a crash loses them for good */

#if SYMMETRY
byte new_bond[HN], new_open[HN];
#endif
byte g, h, q, i, k, pick_, who, used, bar; /* scratch, zero between atomic blocks */

inline choose_one(may, j, x) {
    if :: (may) & BIT(j) -> x = x | BIT(j) :: true fi
}

/* x becomes any subset of `may`. */
inline choose(may, x) {
    x = 0;
    choose_one(may, 0, x); choose_one(may, 1, x); choose_one(may, 2, x); choose_one(may, 3, x); choose_one(may, 4, x);
    choose_one(may, 5, x)
}

/* bar becomes the members that are bound to another list than x. */
inline find_bound(x) {
    bar = 0;
    for (k : 0 .. HN - 1) {
        if :: bond[k] && !SAME(bond[k], x) -> bar = bar | BIT(k) :: else fi
    }
    k = 0
}

/* --- M0 to M3. Every member that is not out joins (one that is never shown a list might as well not have). A key list
 * that too few honest members take leads nowhere, as all of U2 must have signed one T1: it counts as silence. */
inline key_list(g_) {
    choose(ALL & ~out, pick_);
    if
    :: SIZE(pick_) >= SMALLEST && pick_ >= u1[0] && ((pick_ & COL) || pick_ != u1[0]) ->
        choose(pick_ & HONEST & ~used, who); /* M2: once a round, own M1 in it */
        if
        :: who && SIZE(who) + SIZE(pick_ & COL) >= QUORUM(pick_) ->
            u1[g_] = pick_; dealt[g_] = who; used = used | who;
            printf("  M2 key list #%d: taken by #%d\n", pick_, who)
        :: else
        fi
    :: else
    fi
}

inline key_lists() {
    atomic {
        used = out;
        key_list(0);
        if
        :: u1[0] && SIZE(HONEST & ~used) + C >= SMALLEST -> key_list(1)
        :: else
        fi;
        pick_ = 0; who = 0; used = 0
    }
}

/* --- M4, M5: U2 of members that signed my T1, large enough, the very list of a bond. A U2 that too few take is kept only as "spent in vain". */
inline inbox(h_) {
    g = h_ / 2;
    choose(dealt[g] | (u1[g] & COL), pick_);
    if
    :: SIZE(pick_) >= QUORUM(u1[g]) && ((h_ & 1) == 0 || pick_ != u2[2 * g] || (pick_ & COL)) ->
        d_step { if :: !BOND_AT_M7_ONLY -> find_bound(pick_) :: else fi }
        choose(pick_ & dealt[g] & ~used & ~bar, who); /* M4: once a round, own id in it */
        if
        :: who ->
            spent[h_] = who; used = used | who;
            printf("  M4 sharers #%d: taken by #%d, SPENT\n", pick_, who)
        :: else
        fi;
        if
        :: who && SIZE(who) + SIZE(pick_ & COL) >= QUORUM(u1[g]) -> u2[h_] = pick_
        :: else
        fi
    :: else
    fi;
    bar = 0; g = 0; pick_ = 0; who = 0
}

inline inboxes() {
    atomic {
        for (h : 0 .. 3) {
            if
            :: dealt[h / 2] && ((h & 1) == 0 ||
               (u2[h - 1] && SIZE(dealt[h / 2] & ~used) + SIZE(u1[h / 2] & COL) >= QUORUM(u1[h / 2]))) -> inbox(h)
            :: else
            fi
        }
        h = 0; used = 0
    }
}

/* --- M6, M7: U3 within U2, uploads signed under my T2, own id in it, large enough, the bond of (c), nothing signed in
 * this round. Lists without a certificate let nobody do anything: only certified ones are kept. */
inline survivor_list(q_) {
    h = q_ / 2; g = q_ / 4;
    choose(spent[h] | (u2[h] & COL), pick_);
    if
    :: SIZE(pick_) >= QUORUM(u1[g]) && ((q_ & 1) == 0 || pick_ != u3[2 * h] || (pick_ & COL)) ->
        d_step { find_bound(pick_) }
        choose(pick_ & spent[h] & ~bar & ~(NO_SIGNED_RECORD -> 0 : used), who);
        if
        :: SIZE(who) + SIZE(pick_ & COL) >= T(u1[g]) ->
            u3[q_] = pick_; signers[q_] = who;
            if
            :: used & who -> /* NO_SIGNED_RECORD: a second M7 of those that crashed after the first */
                up = up & ~(used & who);
                printf("  #%d crashed and restarted\n", used & who)
            :: else
            fi;
            used = used | who;
            printf("  M7 survivors #%d: signed by #%d, certified\n", pick_, who)
        :: else
        fi
    :: else
    fi;
    bar = 0; h = 0; g = 0; pick_ = 0; who = 0
}

inline survivor_lists() {
    atomic {
        for (q : 0 .. 7) {
            if
            :: u2[q / 2] && ((q & 1) == 0 || u3[q - 1]) -> survivor_list(q)
            :: else
            fi
        }
        q = 0; used = 0
    }
}

/* P2: no two certified lists for one T2, nor for one member set U1 under two. P6: nor in one round at all. */
inline check_lists() {
    for (q : 0 .. 6) {
        for (k : q + 1 .. 7) {
            if
            :: u3[q] && u3[k] ->
                HOLDS(P2, 2, u1[q / 4] != u1[k / 4]);
                HOLDS(P6, 6, false)
            :: else
            fi
        }
    }
    q = 0; k = 0
}

/* --- M8, M9, the abort statement and crashes: member i does any three of these things in any order. */
inline act(i_) {
    if
    :: true
    :: (up & BIT(i_)) && q < 8 && !(released & BIT(i_)) && (ABORTED_IGNORED || !(aborted & BIT(i_))) ->
        printf("  M8 survivors #%d: shown to member %d\n", u3[q], i_);
        if /* the record is durable, then the message leaves; a crash may come between */
        :: !RECORD_LATE -> released = released | BIT(i_);
            if :: shares[q] = shares[q] | BIT(i_) :: up = up & ~BIT(i_) fi
        :: RECORD_LATE -> shares[q] = shares[q] | BIT(i_);
            if :: released = released | BIT(i_) :: up = up & ~BIT(i_) fi
        fi;
        if
        :: (shares[q] & BIT(i_)) && (released & BIT(i_)) -> printf("  M9 of member %d: RELEASED, sent\n", i_)
        :: (shares[q] & BIT(i_)) && !(released & BIT(i_)) -> printf("  M9 of member %d: sent, a crash, no record\n", i_)
        :: else -> printf("  member %d: RELEASED, then a crash; nothing sent\n", i_)
        fi
    :: !(released & BIT(i_)) && !(statements & BIT(i_)) ->
        aborted = aborted | BIT(i_);
        if
        :: statements = statements | BIT(i_); printf("  member %d: ABORTED, statement sent\n", i_)
        :: up = up & ~BIT(i_); printf("  member %d: ABORTED, then a crash; nothing sent\n", i_)
        fi
    :: (up & BIT(i_)) -> up = up & ~BIT(i_); printf("  member %d crashes and restarts\n", i_)
    fi
}

/* P4: whatever crashes between, a member that released never said that it never will, and the reverse. Records and
 * crashes of one round matter only here, so that nothing but the messages that left is kept. */
inline check_records() {
    HOLDS(P4, 4, !(aborted & released) && (!(statements & BIT(i)) || q == 8 || !(shares[q] & BIT(i))));
    aborted = 0; released = 0; up = up | BIT(i)
}

inline ending() {
    d_step { /* q: the certified list that i signed, 8 if none */
        do
        :: q < 8 && !(signers[q] & BIT(i)) -> q++
        :: else -> break
        od
    }
    act(i); act(i); act(i);
    d_step { check_records(); q = 0; i++ }
}

/* --- after the round: P1, P3, P5, and who may retry. */
#define OPENED(q_) (u3[q_] && SIZE(shares[q_]) + SIZE(u1[(q_) / 4] & COL) >= T(u1[(q_) / 4]))

/* P1. Holders deal under T1, so shares of one owner count across the T2s of its key list. The colluders give both. */
inline check_shares(i_, g_) {
    pick_ = SIZE(u1[g_] & COL); /* of b */
    who = pick_;                /* of z */
    for (q : 4 * g_ .. 4 * g_ + 3) {
        if
        :: (u2[q / 2] & BIT(i_)) && (u3[q] & BIT(i_)) -> pick_ = pick_ + SIZE(shares[q])
        :: (u2[q / 2] & BIT(i_)) && !(u3[q] & BIT(i_)) -> who = who + SIZE(shares[q])
        :: else
        fi
    }
    HOLDS(P1, 1, pick_ < T(u1[g_]) || who < T(u1[g_]));
    q = 0; pick_ = 0; who = 0
}

/* P3: the openable rounds with one member's delta have one member list. P7: where they have two, these differ in more
 * than min_survivors - c honest members, so that their difference tells no less than one allowed sum does. */
inline check_openable(q_) {
    printf("  opened: the sum over #%d\n", u3[q_]);
    for (i : 0 .. HN - 1) {
        if
        :: u3[q_] & BIT(i) ->
            not_reached = !(came[i] & REACH & ~(open[i] -> 0 : 4)); assert(not_reached);
            HOLDS(P3, 3, !open[i] || SAME(open[i], u3[q_]));
            HOLDS(P7, 7, !open[i] || SAME(open[i], u3[q_]) || SIZE((open[i] ^ u3[q_]) & HONEST) > SMALLEST - C);
            open[i] = u3[q_]
        :: else
        fi
    }
    i = 0
}

/* Which proof the coordinator has for member i, spent under T2 h. (a) and (b) bind the member less than (c), so the
 * coordinator shows (c) only where it has neither. */
inline retry(i_, h_) {
    g = h_ / 2;
    used = ((statements & BIT(i_)) && SIZE(statements & u1[g]) + SIZE(u1[g] & COL) >=
            SIZE(u1[g]) + C - T(u1[g]) + 1 - SHORT_ABORT); /* (a) */
    for (q : 0 .. 7) {
        if
        :: u3[q] && (q / 2 == h_ || ANY_T2) && !(u3[q] & BIT(i_)) -> used = used | 2 /* (b) */
        :: u3[q] && q / 2 == h_ && (u3[q] & BIT(i_)) -> who = u3[q]; bar = bar | OPENED(q) /* (c) */
        :: else
        fi
    }
    q = 0; g = 0;
    if
    :: used ->
        if
        :: used & 1 -> printf("  member %d may retry by (a)\n", i_)
        :: else -> printf("  member %d may retry by (b)\n", i_)
        fi;
        HOLDS(P5, 5, !bar)
    :: !used && who && NO_BOND -> printf("  member %d may retry by (c), not bound\n", i_)
    :: !used && who && !NO_BOND ->
        if
        :: bond[i_] && bond[i_] != who -> out = out | BIT(i_) /* two different lists end the stage */
        :: else -> bond[i_] = who; printf("  member %d may retry by (c), bound to #%d\n", i_, who)
        fi
    :: else -> out = out | BIT(i_)
    fi;
    if :: out & BIT(i_) -> bond[i_] = 0; open[i_] = 0 :: else fi;
    came[i_] = came[i_] | (REACH & (used -> used : (who -> 4 : 0)));
    who = 0; used = 0; bar = 0
}

inline settle() {
    for (i : 0 .. HN - 1) {
        for (g : 0 .. 1) {
            if :: ASSERTED(1) && (dealt[g] & BIT(i)) -> check_shares(i, g) :: else fi
        }
    }
    for (q : 0 .. 7) {
        if :: (ASSERTED(3) || ASSERTED(7)) && OPENED(q) -> check_openable(q) :: else fi
    }
    for (i : 0 .. HN - 1) {
        for (h : 0 .. 3) {
            if :: (spent[h] & BIT(i)) -> retry(i, h) :: else fi
        }
    }
    for (i : 0 .. 1) { u1[i] = 0; dealt[i] = 0 }
    for (i : 0 .. 3) { u2[i] = 0; spent[i] = 0 }
    for (i : 0 .. 7) { u3[i] = 0; signers[i] = 0; shares[i] = 0 }
    statements = 0;
    i = 0; g = 0; h = 0; q = 0
}

/* Renaming honest members maps runs to runs. Neighbours change names while that makes (out, bond, open) smaller: of the
 * equivalent states fewer are visited; which of them does not matter. */
#define SWAPPED(x, j) (((x) & ~(BIT(j) | BIT(j + 1))) | (((x) & BIT(j)) << 1) | (((x) & BIT(j + 1)) >> 1))
#define OTHER(k_, j)  ((k_) == (j) -> (j) + 1 : ((k_) == (j) + 1 -> (j) : (k_)))

inline rename(j) {
    pick_ = SWAPPED(out, j);
    bar = (pick_ < out -> 1 : (pick_ > out -> 2 : 0)); /* 1: smaller, 2: larger */
    for (k : 0 .. HN - 1) {
        new_bond[k] = SWAPPED(bond[OTHER(k, j)], j);
        new_open[k] = SWAPPED(open[OTHER(k, j)], j);
        if :: bar == 0 && new_bond[k] != bond[k] -> bar = (new_bond[k] < bond[k] -> 1 : 2) :: else fi;
        if :: bar == 0 && new_open[k] != open[k] -> bar = (new_open[k] < open[k] -> 1 : 2) :: else fi
    }
    if
    :: bar == 1 ->
        out = pick_; used = 1;
        for (k : 0 .. HN - 1) { bond[k] = new_bond[k]; open[k] = new_open[k] }
    :: else
    fi;
    for (k : 0 .. HN - 1) { new_bond[k] = 0; new_open[k] = 0 }
    k = 0; pick_ = 0; bar = 0
}

#if SYMMETRY
inline sort() {
    used = 1;
    do
    :: used ->
        used = 0;
        for (i : 0 .. HN - 2) { rename(i) }
    :: else -> break
    od;
    i = 0
}
#else
inline sort() { skip }
#endif

active proctype world() {
    do
    :: ROUNDS == 0 || rounds < ROUNDS ->
        d_step {
            if :: ROUNDS -> rounds++ :: else fi;
            printf("a round\n")
        }
        key_lists();
        inboxes();
        survivor_lists();
        d_step { check_lists() }
        do
        :: atomic { i < HN -> ending() }
        :: d_step { i == HN -> settle(); sort() }; break
        od
    :: true -> break
    od
}
