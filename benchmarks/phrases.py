"""What the test speakers say: turns to an assistant, with the places where one may pause.

`|` marks a hesitation: what stands before it cannot be all. `/` marks a place where what stands
before it could have been the whole turn. A comma is a phrase boundary, and a pause too.
"""

from __future__ import annotations

TURNS = """
I would like to | book a table | for four / on Friday evening
what time is | the next train | to Edinburgh
please remind me to | call my sister / tomorrow morning
my order number is | four two seven / nine one
when you have time, tell me | the date
could you play | some quiet music / in the kitchen
how far is it | from here | to the station
turn off | the lights / in the living room
I was wondering if | you could help me | with my homework
what is | the capital | of New Zealand
set a timer for | twenty five minutes
if it rains tomorrow, we will | have to stay / at home
the meeting was moved / to | Thursday because | the room was taken
my name is | Margaret Wilson / and I live in | Bristol
tell me a story / about | a dragon who | could not fly
do you know / whether the museum | is open / on Sundays
add milk, eggs / and | a loaf of bread / to the shopping list
I think / we should | leave a little earlier / this time
well, I am not really sure / what | to cook / tonight
send a message to | my brother / and tell him | I am running late
is there a pharmacy / near | the main square
read me | the first paragraph / of | the article
that is not | what I meant
I need a taxi / to the airport / at | half past six
why is the sky | blue
how do you spell | necessary
what is seventeen times | twenty three
cancel my appointment / with | the dentist
um, can you | say that again
she told me / that | the shop closes / at nine
let me think, I believe it was | the second of May
who wrote | the old man / and the sea
my phone number is | zero seven seven / one five | eight two
repeat after me, the quick | brown fox
I have been feeling | a bit tired / lately
after dinner, I usually | go for a walk / with | my dog
could you explain | how | a bicycle stays upright
show me | pictures of | mountains / in winter
the reason I am calling is | that | my package never arrived
when does | the library close
we went to the beach / and | the water was | really cold
open | the garage door
what was the score / of | the game / last night
I want to learn | how to bake | bread
please speak | a little more slowly
yes, I would love | some coffee
no, the other | one
count from one / to | ten
what should I wear / to | a winter wedding
my daughter is | eleven years old / and she plays | the violin
give me the recipe / for | onion soup
it was raining / so | we stayed inside / all day
increase the volume / by | twenty percent
does this bus go / to | the city centre
I left my keys / on | the kitchen table
translate good morning / into | French
how many days are there / until | Christmas
find a restaurant / that | serves vegetarian food
first I peeled the potatoes, then I put them | in the oven
the password is | purple elephant
do I need | an umbrella / today
where did I | park the car
my flight leaves / at | seven fifteen / from | gate twelve
are there any | good films / at the cinema
I cannot find | my glasses
what happens if | I press the red button
let us talk about | the budget / for next year
wake me up / at | a quarter to seven
the train to London was late, so I missed | my connection
can I have | a glass of water / please
what does the word | serendipity | mean
I grew up in | a small village / near | the coast
how long does it take / to | boil an egg
book two tickets / for | the evening show
you can call me | Jonathan
the doctor said / I should | drink more water
is it going to | snow / this weekend
take a note, buy flowers / for | grandmother
I would rather | stay here / with | my friends
how old is | the oldest tree / in the world
because of the storm, all flights | were cancelled
my favourite colour is | green
do you remember / what I said / about | the garden
I am looking for | a birthday present / for | my nephew
there are three | chairs / in the hallway
what is the difference between | a crocodile / and | an alligator
pause | the music
lock the front door / and | switch on the alarm
my address is | twelve | Park Lane
tell my wife / that | dinner is ready
it costs about | forty dollars
which way is | north
I started working there / in | nineteen ninety eight
could we | change the subject
on the one hand, it is cheap, on the other hand, it is | rather slow
the green one / is | mine
make it | a bit warmer / in here
have you ever been / to | Japan
I forgot to | water the plants
what time does | the sun rise / tomorrow
our neighbours have | two cats / and | a parrot
between you and me, I never | liked that song
order | another box / of | printer paper
the answer should be | forty two
divide ninety six / by | eight
actually, I changed | my mind
in my opinion, this is the | best book / she has written
how much is | the blue jacket
try to find | a cheaper hotel / with | breakfast included
one moment, I have to | get my glasses
spell the name | Catherine / for me
I was born on / the ninth of | November
he asked me / whether I had | seen the film
start | the washing machine
can you hear | me
before you go, please write down | my number
all of the children | were laughing
who is | the prime minister / of Canada
I really enjoyed | the concert / last week
my computer keeps | shutting down
how would you describe | the taste / of honey
it is about | a family / that moves to | an island
what else can you | do
the next stop is | Oxford
we need to | be there / before | eight o'clock
move my three o'clock meeting / to | Wednesday
is the swimming pool | heated
compare | these two phones
I heard a strange noise / coming from | the attic
to be honest, I expected | something better
when I was young, we had | a big red tractor
check whether | the oven is off
what a | lovely day
every morning / I | read the newspaper
the first thing I noticed was | the smell
did anyone | call / while I was out
go back to | the previous question
there is something | I want to ask you
""".strip().splitlines()

SHORT_TURNS = """
yes
no thanks
hello
good morning
stop
thank you very much
goodbye
yes please
okay
never mind
what time is it
tell me a joke
louder
go on
that is right
maybe later
""".strip().splitlines()
"""Turns too short for a pause inside."""

INTERRUPTIONS = """
stop please
wait a second
no I meant tomorrow
hang on, what about Sunday
that is enough, thank you
sorry, can I ask something else
let me interrupt you there
never mind that, what time is it
not that one, the other one
okay okay I understand
""".strip().splitlines()
"""Said while a reply is playing."""
